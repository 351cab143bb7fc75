"""What a method is given, and what a method is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """B images of N tokens each, all of them valid; nothing here needs a gradient."""

    metric: Tensor  # [B, N, C] what is compared
    scores: Tensor  # [B, N] float32, importance; zeros for a method that needs none
    size: Tensor  # [B, N] float32, how many original tokens each stands for
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to choose what stays.

    run           (problem, budget, **options) -> int64, for 1 <= budget < N:
                  [B, budget] the tokens to keep, distinct, in any order; or, if it merges,
                  [B, N] the output token each input joins, in 0..budget-1, none of them empty
    needs_scores  whether it reads Problem.scores
    merges        whether it merges or picks
    options       the names of its options, each with the check that refuses a bad value
    """

    run: Callable[..., Tensor]
    needs_scores: bool = False
    merges: bool = False
    options: Mapping[str, Callable[[str, Any], object]] = field(default_factory=dict)
