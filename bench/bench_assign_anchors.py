"""assign_anchors against the usual formulation: one batched product of tokens and anchors."""

from bench.gpu.tokens import (
    SIZES,
    TINY,
    assign_units,
    compiled_form,
    flash_kmeans_assign,
    half,
    released_assign,
    token_cost,
)
from bench.harness import Gpu, Peer, main
from restore_ext import assign_anchors
from restore_ext.bench import plain
from restore_ext.testing.tokens import TokenCase, check_assign_anchors


class Case(TokenCase):
    def arguments(self, device, dtype):
        return {"x": self.x(device, dtype), "anchors": self.anchors(device)}


CASES = [Case(k=32), Case(k=32, C=4096), Case(B=4, N=196, k=16, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain.assign_anchors, "restore_ext": assign_anchors}
    peers = {
        "torch.compile": compiled_form(plain.assign_anchors),
        "released code": half(released_assign),
        "units given": Peer(assign_units, exact=False),
        "flash-kmeans, units given": Peer(flash_kmeans_assign, exact=False),
    }
    gpu = Gpu([Case(k=s["N"] // 9, **s) for s in SIZES], [Case(k=5, **s) for s in TINY], peers)
    cost = token_cost(lambda given: given["anchors"].numel() * given["x"].shape[1])
    main("assign_anchors", CASES, providers, check_assign_anchors, gpu=gpu, cost=cost)
