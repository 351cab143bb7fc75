"""DivPrune: the tokens that differ most from each other."""

from torch import Tensor

from restore_ext import ops
from restore_ext.methods.problem import Method, Problem


def select(problem: Problem, budget: int) -> Tensor:
    """Greedy max-min of the cosine distance (DivPrune, arXiv 2503.02175): ops.select_diverse."""
    return ops.select_diverse(problem.metric, budget)


DIVPRUNE = Method(
    select, source="2503.02175", about="those that differ most: greedy max-min of the distance"
)
