"""score_anchors against the usual formulation, which stores all N x N cosines."""

from bench.gpu.tokens import (
    SIZES,
    TINY,
    compiled_form,
    half,
    released_scores,
    square,
    token_cost,
)
from bench.harness import Gpu, main
from restore_ext import score_anchors
from restore_ext.bench import plain
from restore_ext.testing.tokens import TokenCase, check_score_anchors


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"x": self.x(device, dtype)}


CASES = [Case(), Case(C=4096), Case(B=4, N=196, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain.score_anchors, "restore_ext": score_anchors}
    peers = {
        "torch.compile": compiled_form(plain.score_anchors),
        "released code": half(released_scores, mode="official"),
    }
    gpu = Gpu([Case(**s) for s in SIZES], [Case(**s) for s in TINY], peers)
    cost = token_cost(square)
    main("score_anchors", CASES, providers, check_score_anchors, gpu=gpu, cost=cost)
