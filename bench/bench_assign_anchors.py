"""assign_anchors against the usual formulation: one batched product of tokens and anchors."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.harness import main
from restore_ext import assign_anchors
from restore_ext.testing.tokens import TokenCase, check_assign_anchors


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"x": self.x(device, dtype), "anchors": self.anchors(device)}


def plain_torch(x: Tensor, anchors: Tensor) -> Tensor:
    unit = normalize(x.float(), dim=-1)
    chosen = unit.gather(1, anchors[..., None].expand(-1, -1, x.shape[2]))
    group = (unit @ chosen.mT).argmax(-1)
    return group.scatter(
        1, anchors, torch.arange(anchors.shape[1], device=x.device).expand_as(anchors)
    )


CASES = [Case(k=32), Case(k=32, C=4096), Case(B=4, N=196, k=16, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain_torch, "restore_ext": assign_anchors}
    main("assign_anchors", CASES, providers, check_assign_anchors)
