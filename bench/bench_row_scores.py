"""row_scores against plain torch, which stores the attention of every row, head and key.

On a GPU also against that under torch.compile, and against the trick that needs no new kernel: SDPA
over one-hot values, where a row is the attention of a single query.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Gpu, Peer, main
from bench.provider import Given, Missing, compiled
from restore_ext import row_scores
from restore_ext.bench import plain
from restore_ext.testing.row_scores import RowScoresCase, truth

TOLERANCE = 1e-4  # relative, of all scores: the logits are float32
FEW = 2**24  # weights, of the rows that float64 is asked for


def check(score: Tensor, **given: Any) -> float:
    """Raises where the scores are wrong, returns how far they are from float64 otherwise."""
    exact = torch.zeros_like(score, dtype=torch.float64)
    Hq, R = given["query"].shape[1:3]
    step = max(FEW // (Hq * given["key"].shape[2]), 1)
    weight = given["weight"]
    if weight is None:
        weight = torch.full((len(score), R), 1 / R, device=score.device)
    given = filled(given)
    for first in range(0, R, step):  # float64 would not fit for all rows
        rows = slice(first, min(first + step, R))
        part = given | {
            "query": given["query"][:, :, rows],
            "weight": weight[:, rows],
            "query_position": given["query_position"][..., rows],
        }
        if given["key_range"] is not None:
            part["key_range"] = given["key_range"][:, rows]
        exact += truth(part)
    assert score.shape == exact.shape and score.isfinite().all()
    error = ((score - exact).norm() / exact.norm()).item()
    assert error <= TOLERANCE, f"the relative error is {error:.1e}"
    return error


def filled(given: Given) -> Given:
    """With positions said, which else are counted from the last row of all."""
    if given["query_position"] is not None:
        return given
    B, _, R, _ = given["query"].shape
    K = given["key"].shape[2]
    index = torch.arange(K - R, K, dtype=torch.int32, device=given["query"].device)
    keys = torch.arange(K, dtype=torch.int32, device=given["query"].device)
    return given | {"query_position": index.expand(B, -1), "key_position": keys.expand(B, -1)}


def compiled_form(**given: Any) -> Callable[[], Tensor]:
    call = compiled(plain.row_scores, given["query"].device)
    return lambda: call(**given)


def by_one_hot_values(**given: Any) -> Callable[[], Tensor]:
    """One query, no bias: attention over the identity is the attention."""
    query, key = given["query"], given["key"]
    if query.shape[2] > 1 or given["log_size"] is not None or given["decay"] is not None:
        raise Missing("knows one row without a bias")
    B, Hkv, K, _ = key.shape
    one_hot = torch.eye(K, dtype=key.dtype, device=key.device).expand(B, Hkv, K, K)
    shared = query.shape[1] != Hkv

    def call() -> Tensor:
        out = scaled_dot_product_attention(query, key, one_hot, enable_gqa=shared)
        return out.float().mean(1)[:, 0]

    return call


def cost(given: Given) -> tuple[float, float]:
    """Operations of one pass over the products (two are made), and bytes read and written once."""
    query, key = given["query"], given["key"]
    B, H, R, D = query.shape
    K = key.shape[2]
    seen = R * K - (R * (R - 1) / 2 if given["key_range"] is not None else 0)
    moved = (query.numel() + key.numel()) * query.element_size() + 4 * B * K
    return 2.0 * B * H * D * seen, float(moved)


def rows(R: int, K: int, Hq: int = 32, Hkv: int = 32, B: int = 1, **more: Any) -> RowScoresCase:
    """Many rows are all tokens of a causal prompt."""
    asked: dict[str, Any] = {"sizes": False, "positions": None, "P": 0} | more
    return RowScoresCase(
        B=B, Hq=Hq, Hkv=Hkv, Lq=R, Lk=K, ranges="causal" if R == K else None, **asked
    )


CASES = [rows(1, 704, 8, 8), rows(1, 704, 8, 2), rows(20, 704, 8, 8), rows(704, 704, 8, 8)]
ON_GPU = [
    rows(1, 704),  # LLaVA-1.5: the last prompt token, its text raters, all tokens
    rows(1, 704, B=64),
    rows(20, 704),
    rows(704, 704),
    rows(320, 320, sizes=True, positions="merged", P=4096),  # merged before, calibrated
    rows(1, 3400, 28, 4),  # Qwen2.5-VL
    rows(30, 3400, 28, 4),
    rows(3400, 3400, 28, 4),
    rows(16384, 16384, 28, 4),
    rows(1, 577, 16, 16, B=5, D=64),  # CLS of a ViT-L
]
TINY = [rows(1, 40, 4, 2), rows(37, 37, 4, 4, B=2), rows(5, 40, 4, 2, sizes=True, P=64)]

if __name__ == "__main__":
    providers = {"plain torch": plain.row_scores, "restore_ext": row_scores}
    peers = {
        "torch.compile": Peer(compiled_form),
        "SDPA, one-hot values": Peer(by_one_hot_values, exact=False),
    }
    gpu = Gpu(ON_GPU, TINY, peers)
    main("row_scores", CASES, providers, check, gpu=gpu, cost=cost)
