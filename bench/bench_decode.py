"""One decoding step of calibrated_attention: sizes alone, as a cache has them, no distances."""

import torch

from bench.gpu.attention import (
    BACKENDS,
    KEPT,
    check,
    cost,
    flashinfer_decode,
    official_step,
    without_bias,
)
from bench.harness import Gpu, Peer, main
from bench.provider import Given
from restore_ext import calibrated_attention
from restore_ext.bench import plain
from restore_ext.testing.attention import AttentionCase


class Step(AttentionCase):
    def arguments(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Given:
        given = super().arguments(device, dtype)
        return given | {"query_position": None, "key_position": None}


def step(L: int, Hq: int = 32, Hkv: int = 32, B: int = 1, D: int = 128) -> Step:
    return Step(B=B, Hq=Hq, Hkv=Hkv, Lq=1, Lk=L, D=D, P=0)


CASES = [step(660, 3, 3, D=64), step(704, 8, 8), step(704, 8, 2)]
ON_GPU = [
    step(320),  # LLaVA-1.5, reduced and not
    step(704),
    step(3400, Hq=28, Hkv=4),  # Qwen2.5-VL
    step(16384, Hq=28, Hkv=4),
    step(704, B=64),
    step(3400, Hq=28, Hkv=4, B=64),
    step(16384, Hq=28, Hkv=4, B=16),
]

if __name__ == "__main__":
    providers = {
        "SDPA, new mask": plain.calibrated_attention,
        "SDPA, old mask": KEPT,
        "restore_ext": calibrated_attention,
    }
    peers = {
        "released code's layer": Peer(official_step),
        **BACKENDS,
        "FlashInfer, no bias": Peer(flashinfer_decode, without_bias),
    }
    gpu = Gpu(ON_GPU, [step(40, 4, 2), step(37, 4, 4, B=2)], peers)
    main("calibrated_attention_decode", CASES, providers, check, gpu=gpu, cost=cost)
