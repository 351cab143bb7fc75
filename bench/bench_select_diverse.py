"""select_diverse against the usual formulation: all N x N distances, then a loop over the picks."""

from bench.gpu.tokens import SIZES, TINY, half, released_diverse, square, token_cost
from bench.harness import Gpu, main
from restore_ext import select_diverse
from restore_ext.bench import plain
from restore_ext.testing.tokens import TokenCase, check_select_diverse


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"x": self.x(device, dtype), "k": self.k}


CASES = [Case(), Case(C=4096), Case(B=4, N=196, k=32, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain.select_diverse, "restore_ext": select_diverse}
    peers = {"released code": half(released_diverse)}
    budgets = [min(s["N"] // 9, 128) for s in SIZES]
    cases = [Case(k=k, **s) for k, s in zip(budgets, SIZES, strict=True)]
    gpu = Gpu(cases, [Case(k=5, **s) for s in TINY], peers)
    cost = token_cost(square)
    main("select_diverse", CASES, providers, check_select_diverse, gpu=gpu, cost=cost)
