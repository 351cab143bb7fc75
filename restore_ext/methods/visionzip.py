"""VisionZip: the tokens the picture attends to, and a few means of all others."""

from functools import partial

import torch
from torch import Tensor

from restore_ext import ops
from restore_ext.checks import require_share
from restore_ext.methods.problem import CLS, KEYS, Method, Problem
from restore_ext.rows import falling, where_true

CONTEXTUAL_RATIO = 10 / 64  # the paper's 10 of 64, 20 of 128 and 30 of 192


def merge(problem: Problem, budget: int, *, contextual_ratio: float = CONTEXTUAL_RATIO) -> Tensor:
    """Dominant tokens alone, the others joined to contextual ones (VisionZip, arXiv 2412.04467).

    K = max(1, int(contextual_ratio * budget)) tokens are contextual; the budget - K highest scores
    are dominant and stay. Of the R others, in raster order, the K at 0, s, 2 s, ... with
    s = floor(R / K) are targets, and each of the rest joins the target whose `metric` is the most
    similar. What differs from the released code: the CLS token, which is no feature of the model,
    is not kept beside them; features are merged after the projector, not before; and a contextual
    token is the mean of its group, not the target plus the mean of those that joined it.
    """
    B, N, _ = problem.metric.shape
    contextual = max(1, int(contextual_ratio * budget))
    dominant = falling(problem.scores)[:, : budget - contextual]
    group = torch.full((B, N), -1, device=problem.metric.device)
    names = torch.arange(contextual, budget, device=group.device)
    group.scatter_(1, dominant, names.expand_as(dominant))
    rest = group < 0
    left = N - dominant.shape[1]
    step = left // contextual
    targets = where_true(rest, left)[:, : contextual * step : step]
    return torch.where(rest, ops.assign_anchors(problem.metric, targets, valid=rest), group)


def select(problem: Problem, budget: int, **options: float) -> Tensor:
    """The dominant tokens, where RESTORE's anchors (arXiv 2606.01711) take the place of the
    contextual ones; `contextual_ratio` has no part in it."""
    return falling(problem.scores)[:, :budget]


VISIONZIP = Method(
    select,
    merge,
    scores=CLS,
    metric=KEYS,
    options={"contextual_ratio": partial(require_share, above_zero=True)},
    source="2412.04467",
    about="the highest attention of the CLS token; evenly spaced others collect the rest",
)
