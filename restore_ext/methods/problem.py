"""What a method is given, and what a method is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Where a method acts.
PICTURE = "on the picture, before the vision tower"
TOWER = "in the blocks of the vision tower"
PROJECTED = "after the projector"
INSIDE = "inside the language model"

# What Problem.scores is in a hooked model.
CLS = "cls"
RECEIVED = "received"

# What Problem.metric is in a hooked model.
FEATURES = "features"
TOWER_FEATURES = "tower"
KEYS = "keys"


@dataclass(frozen=True)
class Problem:
    """B images of N tokens each, all of them valid; nothing here needs a gradient."""

    metric: Tensor  # [B, N, C] what is compared
    scores: Tensor  # [B, N] float32, importance; zeros for a method that needs none
    size: Tensor  # [B, N] float32, how many original tokens each stands for
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to make few tokens of many.

    select   (problem, budget, **options) -> int64 [B, budget], for 1 <= budget < N: the tokens to
             keep, distinct, in any order. RESTORE merges what it would drop. None: there is no
             such rule, `merge` is all of the method, plain or not
    merge    the same arguments -> int64 [B, N], the output token each input joins, in
             0..budget-1, none of them empty. With a `select` beside it, it is the plain method
             alone, and RESTORE's anchors stand in for it
    place    where it acts; only what acts on projected features has a `select` or a `merge`
    scores   what it reads from Problem.scores: CLS, the attention of the tower's CLS token (the
             attention received, where a tower has none); RECEIVED, the attention that a token
             receives, mean over heads and queries; None, nothing
    metric   what it compares: FEATURES, those that are reduced; TOWER_FEATURES, what goes into the
             projector; KEYS, of the layer that the scores are read from, mean over heads
    options  the names of its options, each with the check that refuses a bad value
    source   of the paper on arXiv, as its number; none: there is no paper
    about    what it does, in one line
    """

    select: Callable[..., Tensor] | None = None
    merge: Callable[..., Tensor] | None = None
    place: str = PROJECTED
    scores: str | None = None
    metric: str = FEATURES
    options: Mapping[str, Callable[[str, Any], object]] = field(default_factory=dict)
    source: str | None = None
    about: str = ""

    @property
    def restores(self) -> bool:
        """Whether RESTORE has anything to add."""
        return self.place != PICTURE

    @property
    def needs_scores(self) -> bool:
        return self.scores is not None

    def merges(self, restore: bool) -> bool:
        """Whether it merges by its own rule."""
        return self.merge is not None and not (restore and self.select is not None)
