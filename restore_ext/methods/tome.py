"""ToMe: merge the most similar pairs until few enough are left."""

from functools import partial

import torch
from torch import Tensor

from restore_ext import ops
from restore_ext.checks import require_share
from restore_ext.methods.problem import Method, Problem
from restore_ext.rows import ranks, take


def merge(problem: Problem, budget: int, *, share: float = 0.5) -> Tensor:
    """Rounds of bipartite soft matching (ToMe, arXiv 2210.09461, section 3), all in one place.

    A round on n tokens takes r = min(n - budget, floor(n / 2), max(1, int(share * n))) pairs: with
    the default share it halves the tokens until one last, smaller round. What it compares is the
    size-weighted mean of `metric` over the original members of every token so far (rounded once),
    in rising order of their lower median position, so that partners alternate across the picture.
    """
    B, N, _ = problem.metric.shape
    metric = problem.metric
    group = torch.arange(N, device=metric.device).expand(B, N)
    n = N
    while n > budget:
        r = min(n - budget, n // 2, max(1, int(share * n)))
        group = join_pairs(metric, r).gather(1, group)
        n -= r
        metric, _, position = ops.merge_tokens(problem.metric, group, n, size=problem.size)
        order = position.argsort(1)
        metric, group = take(metric, order), ranks(order).gather(1, group)
    return group


def join_pairs(metric: Tensor, r: int, *, class_token: bool = False) -> Tensor:
    """One round: the new index [B, N] of every token of metric [B, N, C], in the old order, once
    the r most similar pairs of `ops.match_bipartite` are one token each, at the odd one's place."""
    _, src, dst = ops.match_bipartite(metric, r, class_token=class_token)
    index = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[:2])
    stays = torch.ones_like(index, dtype=torch.bool).scatter(1, src, False)
    return (stays.cumsum(1) - 1).gather(1, index.scatter(1, src, dst))


TOME = Method(
    merge=merge,
    options={"share": partial(require_share, above_zero=True)},
    source="2210.09461",
    about="the most similar pairs, round after round",
)
