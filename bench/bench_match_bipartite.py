"""match_bipartite against the usual formulation: one batched product of even and odd tokens."""

from bench.gpu.tokens import (
    SIZES,
    TINY,
    compiled_form,
    half,
    match_units,
    released_match,
    token_cost,
)
from bench.harness import Gpu, Peer, main
from restore_ext import match_bipartite
from restore_ext.bench import plain
from restore_ext.testing.tokens import TokenCase, check_match_bipartite


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"metric": self.x(device, dtype), "r": self.k}


CASES = [Case(k=144, C=64), Case(k=144), Case(B=8, N=196, k=16, C=64)]

if __name__ == "__main__":
    providers = {"plain torch": plain.match_bipartite, "restore_ext": match_bipartite}
    peers = {
        "torch.compile": compiled_form(plain.match_bipartite),
        "released code": half(released_match),
        "units given": Peer(match_units, exact=False),
    }
    gpu = Gpu([Case(k=s["N"] // 4, **s) for s in SIZES], [Case(k=7, **s) for s in TINY], peers)
    cost = token_cost(lambda given: len(given["metric"]) * given["metric"].shape[1] ** 2 / 4)
    main("match_bipartite", CASES, providers, check_match_bipartite, gpu=gpu, cost=cost)
