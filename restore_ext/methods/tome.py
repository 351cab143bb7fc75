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
        _, src, dst = ops.match_bipartite(metric, r)
        index = torch.arange(n, device=metric.device).expand(B, n)
        stays = torch.ones_like(index, dtype=torch.bool).scatter(1, src, False)
        name = (stays.cumsum(1) - 1).gather(1, index.scatter(1, src, dst))  # a pair shares dst's
        group = name.gather(1, group)
        n -= r
        metric, _, position = ops.merge_tokens(problem.metric, group, n, size=problem.size)
        order = position.argsort(1)
        metric, group = take(metric, order), ranks(order).gather(1, group)
    return group


TOME = Method(
    merge=merge,
    options={"share": partial(require_share, above_zero=True)},
    source="2210.09461",
    about="the most similar pairs, round after round",
)
