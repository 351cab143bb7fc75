"""VisPruner: the tokens the picture attends to, and of the others those that repeat nobody."""

import torch
from torch import Tensor

from restore_ext import ops
from restore_ext.checks import require_count, require_share
from restore_ext.methods.problem import CLS, TOWER_FEATURES, Method, Problem
from restore_ext.rows import falling, take


def select(problem: Problem, budget: int, *, important_ratio: float = 0.5, step: int = 8) -> Tensor:
    """Important tokens by score, then diverse ones by de-duplication (VisPruner, arXiv 2412.01818).

    The int(budget * important_ratio) highest scores stay. The others line up in falling score, and
    every second one, from the first on, is compared with those between: the min(step, surplus) of
    them most similar to one of the others go. Who is left of the compared, in falling similarity,
    followed by the others, is the next line, until the budget is met. A line of R tokens gives up
    at most floor(R / 2) a round, so odd ones work and `step` may be any size.
    """
    order = falling(problem.scores)
    important = int(budget * important_ratio)
    if important == budget:
        return order[:, :important]
    line = order[:, important:]
    while (surplus := line.shape[1] - (budget - important)) > 0:
        metric = take(problem.metric, line)
        left, _, _ = ops.match_bipartite(metric, min(step, surplus, line.shape[1] // 2))
        line = torch.cat([line.gather(1, left), line[:, 1::2]], 1)
    return torch.cat([order[:, :important], line], 1)


VISPRUNER = Method(
    select,
    scores=CLS,
    metric=TOWER_FEATURES,
    options={"important_ratio": require_share, "step": require_count},
    source="2412.01818",
    about="half by attention of the CLS token, half by dropping duplicates",
)
