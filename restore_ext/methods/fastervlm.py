"""FasterVLM: the tokens that the CLS token attends to most."""

from torch import Tensor

from restore_ext.methods.problem import CLS, Method, Problem
from restore_ext.rows import falling


def select(problem: Problem, budget: int) -> Tensor:
    """The `budget` highest scores (FasterVLM, the first version of arXiv 2412.01818)."""
    return falling(problem.scores)[:, :budget]


FASTERVLM = Method(
    select, scores=CLS, source="2412.01818", about="the highest attention of the CLS token"
)
