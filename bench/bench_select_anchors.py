"""select_anchors against the usual formulation, which stores all N x N cosines."""

from torch import Tensor

from bench.harness import main
from restore_ext import reference, select_anchors
from restore_ext.testing.tokens import TokenCase, check_select_anchors


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"x": self.x(device, dtype), "k": self.k}


def plain_torch(x: Tensor, k: int) -> Tensor:
    return reference.score_anchors(x.float()).topk(k).indices.sort().values


CASES = [Case(), Case(C=4096), Case(B=4, N=196, k=32, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain_torch, "restore_ext": select_anchors}
    main("select_anchors", CASES, providers, check_select_anchors)
