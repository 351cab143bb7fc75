"""calibrated_attention_paged: a decoding step over a cache in pages, against gathering it first."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from bench.gpu import attention
from bench.gpu.attention import sdpa_mask_kept
from bench.harness import Gpu, Peer, main
from bench.provider import Given
from restore_ext import calibrated_attention, calibrated_attention_paged
from restore_ext.bench import plain
from restore_ext.testing.paged import PagedCase, contiguous


def no_pages(fn: Callable[..., Callable[[], Tensor]]) -> Peer:
    """It has the cache in one piece to begin with."""
    return Peer(lambda **given: fn(**contiguous(given)))


def ours_without_pages(**given: Any) -> Callable[[], Tensor]:
    return lambda: calibrated_attention(**given)


def check(out: Tensor, **given: Any) -> float:
    return attention.check(out, **contiguous(given))


def cost(given: Given) -> tuple[float, float]:
    return attention.cost(contiguous(given))


def step(L: int, Hq: int, Hkv: int, B: int = 1, page: int = 16) -> PagedCase:
    return PagedCase(Hq=Hq, Hkv=Hkv, page=page, lengths=(L,) * B)


CASES = [step(704, 8, 8), step(704, 8, 2)]
ON_GPU = [
    step(704, 32, 32),
    step(3400, 28, 4),
    step(3400, 28, 4, page=128),
    step(16384, 28, 4),
    step(704, 32, 32, B=64),
    step(3400, 28, 4, B=64),
]

if __name__ == "__main__":
    paged = plain.calibrated_attention_paged
    # Not captured: it asks how long rows are.
    gather = Peer(lambda **given: partial(paged, **given), captured=False)
    providers = {
        "gather, SDPA, new mask": gather,
        "restore_ext": calibrated_attention_paged,
    }
    peers = {
        "no pages, SDPA, old mask": no_pages(sdpa_mask_kept),
        "no pages, restore_ext": no_pages(ours_without_pages),
    }
    gpu = Gpu(ON_GPU, [step(40, 4, 2), step(37, 4, 4, B=2)], peers)
    main("calibrated_attention_paged", CASES, providers, check, gpu=gpu, cost=cost)
