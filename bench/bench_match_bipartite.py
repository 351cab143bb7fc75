"""match_bipartite against the usual formulation: one batched product of even and odd tokens."""

from torch import Tensor
from torch.nn.functional import normalize

from bench.harness import main
from restore_ext import match_bipartite
from restore_ext.testing.tokens import TokenCase, check_match_bipartite


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"metric": self.x(device, dtype), "r": self.k}


def plain_torch(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    unit = normalize(metric.float(), dim=-1)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    src, left = order[:, :r], order[:, r:]
    return 2 * left, 2 * src, 2 * partner.gather(1, src) + 1


CASES = [Case(k=144, C=64), Case(k=144), Case(B=8, N=196, k=16, C=64)]

if __name__ == "__main__":
    providers = {"plain torch": plain_torch, "restore_ext": match_bipartite}
    main("match_bipartite", CASES, providers, check_match_bipartite)
