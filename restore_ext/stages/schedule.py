"""Any number of tokens in any layer."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from restore_ext.checks import require_flag, require_int, require_one_of, require_share
from restore_ext.stages.select import make_stage, share_of
from restore_ext.stages.stage import SCORES, Request, Stage, StageMethod


def stages(
    request: Request,
    *,
    layers: Sequence[int | float | None] = (),
    scores: str = "attention",
    merge: bool = False,
) -> tuple[Stage, ...]:
    """What every layer keeps of an image, as a search finds it (arXiv 2412.00556).

    layers  one entry a layer, not rising: ints are tokens (1 is one token, 0 none), floats are
            shares in [0, 1] of what an image has at the first layer, at least one token if above
            0; None is what the layer before has. There is a cut wherever an entry is below the one
            before. The first entry cuts nothing: it says what the others are to be compared with.
    scores  "attention": by the last token of the prompt, in the layer before the cut; "raters": by
            the text behind the image that looks at it, see sparsevlm; "lookahead": by the last
            token, in the layer behind the cut; "none": evenly spaced tokens
    merge   the others are merged into distinctive anchors, see make_stage
    """
    if len(layers) != request.depth:
        raise ValueError(
            f"layers must have one entry for each of the model's {request.depth} layers, got "
            f"{len(layers)}"
        )

    def count(n: int, now: int, entry: int | float) -> int:
        return min(now, entry if isinstance(entry, int) else share_of(n, entry))

    made, before = [], layers[0]
    for layer, entry in enumerate(layers):
        if layer and entry is not None and entry != before:
            counter: Callable[[int, int], int] = partial(count, entry=entry)
            made.append(make_stage(layer, counter, scores, merge, request))
        before = before if entry is None else entry
    return tuple(made)


def require_entries(name: str, value: Any) -> None:
    """Counts or shares, not rising."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not len(value):
        raise TypeError(f"{name} must be a list with one entry a layer, got {value!r}")
    given = [(i, entry) for i, entry in enumerate(value) if entry is not None]
    for i, entry in given:
        if isinstance(entry, float):
            require_share(f"{name}[{i}]", entry)
        elif require_int(f"{name}[{i}]", entry) < 0:
            raise ValueError(f"{name}[{i}] must be an int >= 0, got {entry}")
    if len({isinstance(entry, float) for _, entry in given}) > 1:
        raise TypeError(f"{name} must be all counts (ints) or all shares (floats), got {value!r}")
    for (_, one), (i, other) in pairwise(given):
        if other > one:
            raise ValueError(f"{name} must not rise with depth, got {one} and {other} at {i}")


def require_scores(name: str, value: Any) -> None:
    require_one_of(name, value, SCORES)


SCHEDULE = StageMethod(
    stages,
    {"layers": require_entries, "scores": require_scores, "merge": require_flag},
    budget=False,
    needs="by `scores`: as fastv, pyramiddrop or sparsevlm, or none",
    source="2412.00556",
    about="as many as are listed for every layer, as a search finds them",
)
