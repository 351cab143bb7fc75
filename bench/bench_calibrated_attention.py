"""calibrated_attention against SDPA with the bias as a mask, built for the call or kept.

A case without sizes and distances is plain causal attention, where SDPA needs no mask at all. On a
GPU also against the released code's layer and against kernels that know a bias, or none.
"""

from bench.gpu.attention import BACKENDS, KEPT, OURS_BY, check, cost, official_layer
from bench.harness import Gpu, Peer, main
from restore_ext.bench import plain
from restore_ext.testing.attention import AttentionCase

CASES = [
    AttentionCase(Hq=3, Hkv=3, Lq=660, Lk=660, D=64),  # the model in the package, all tokens
    AttentionCase(Hq=3, Hkv=3, Lq=148, Lk=148, D=64),  # and 64 of 576
    AttentionCase(Hq=8, Hkv=8, Lq=183, Lk=183),
    AttentionCase(Hq=8, Hkv=8, Lq=704, Lk=704),
    AttentionCase(Hq=8, Hkv=8, Lq=704, Lk=704, sizes=False, P=0),
    AttentionCase(Hq=8, Hkv=2, Lq=1, Lk=704, P=0),  # a decoding step
]


def prompt(L: int, Hq: int = 32, Hkv: int = 32, B: int = 1, merged: bool = True) -> AttentionCase:
    positions = "merged" if merged else None
    return AttentionCase(
        B=B, Hq=Hq, Hkv=Hkv, Lq=L, Lk=L, sizes=merged, positions=positions, P=max(4096, L)
    )


ON_GPU = [
    prompt(192),  # LLaVA-1.5, 64 and 192 of 576 tokens kept, and all
    prompt(320),
    prompt(704, merged=False),
    prompt(4096),  # where kernels reach their plateau
    prompt(704, B=64),
    prompt(1024, Hq=28, Hkv=4),  # Qwen2.5-VL, reduced and not
    prompt(3400, Hq=28, Hkv=4),
    prompt(512),  # LLaVA-NeXT
    prompt(3000, merged=False),
    prompt(8192),
    prompt(16384, Hq=28, Hkv=4, merged=False),
]
TINY = [prompt(40, Hq=4, Hkv=2), prompt(37, Hq=2, Hkv=2, B=2, merged=False)]

if __name__ == "__main__":
    providers = {
        "SDPA, new mask": plain.calibrated_attention,
        "SDPA, old mask": KEPT,
        "restore_ext": OURS_BY,
    }
    peers = {"released code's layer": Peer(official_layer), **BACKENDS}
    gpu = Gpu(ON_GPU, TINY, peers)
    main("calibrated_attention", CASES, providers, check, gpu=gpu, cost=cost)
