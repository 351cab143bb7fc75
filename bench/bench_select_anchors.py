"""select_anchors against the usual formulation, which stores all N x N cosines."""

from bench.gpu.tokens import (
    SIZES,
    TINY,
    compiled_form,
    half,
    released_anchors,
    square,
    token_cost,
    topk_of_scores,
)
from bench.harness import Gpu, Peer, main
from restore_ext import select_anchors
from restore_ext.bench import plain
from restore_ext.testing.tokens import TokenCase, check_select_anchors


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"x": self.x(device, dtype), "k": self.k}


CASES = [Case(), Case(C=4096), Case(B=4, N=196, k=32, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain.select_anchors, "restore_ext": select_anchors}
    peers = {
        "torch.compile": compiled_form(plain.select_anchors),
        "torch.topk, scores given": Peer(topk_of_scores),
        "released code": half(released_anchors, mode="official"),
    }
    gpu = Gpu([Case(k=s["N"] // 9, **s) for s in SIZES], [Case(k=5, **s) for s in TINY], peers)
    cost = token_cost(square)
    main("select_anchors", CASES, providers, check_select_anchors, gpu=gpu, cost=cost)
