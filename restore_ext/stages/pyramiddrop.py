"""PyramidDrop: fewer tokens from stage to stage, picked by the layer that comes next."""

from collections.abc import Callable

from restore_ext.checks import require_flag
from restore_ext.stages.checks import require_layers, require_shares
from restore_ext.stages.select import make_stage
from restore_ext.stages.stage import Request, Stage, StageMethod

PUBLISHED_LAYERS = (8, 16, 24)  # of 32
LAST_SHARE = 0.125  # after three stages that each halve


def stages(
    request: Request,
    *,
    layers: tuple[int, ...] | None = None,
    ratios: tuple[float, ...] | None = None,
    merge: bool = False,
) -> tuple[Stage, ...]:
    """PyramidDrop (arXiv 2410.17247): cuts at the inputs of `layers`, 8, 16 and 24 of 32.

    At each of them an image keeps the tokens that the last token of the prompt would attend to
    most in that very layer, averaged over heads: its queries and keys are made of the hidden
    states before the cut. Of n tokens at first, max(1, int(n * ratio)) stay: ratios 0.5, 0.25 and
    0.125 by default. `keep` and `keep_ratio` say what is left behind the last cut, with the same
    factor at every cut. Without RESTORE the positions of what is left are counted anew.

    layers  of the cuts, rising; the default is scaled to the depth of the model
    ratios  one for each of them, not rising; instead of keep and keep_ratio
    merge   the others are merged into distinctive anchors, see make_stage
    """
    if layers is None:
        layers = tuple(sorted({request.scaled(layer) for layer in PUBLISHED_LAYERS}))
    budget = request.keep is not None or request.keep_ratio is not None
    if ratios is not None and (budget or len(ratios) != len(layers)):
        raise ValueError(
            f"ratios must be one for each of the {len(layers)} layers {list(layers)}, and neither "
            f"keep nor keep_ratio given; got {list(ratios)}, {request.keep}, {request.keep_ratio}"
        )

    def counter(i: int) -> Callable[[int, int], int]:
        def count(n: int, now: int) -> int:
            if ratios is not None:
                share = ratios[i]
            else:
                share = request.share(n, LAST_SHARE) ** ((i + 1) / len(layers))
            return min(now, max(1, int(n * share + 1e-9)))  # a root that came out a hair low

        return count

    return tuple(
        make_stage(layer, counter(i), "lookahead", merge, request) for i, layer in enumerate(layers)
    )


PYRAMIDDROP = StageMethod(
    stages,
    {"layers": require_layers, "ratios": require_shares, "merge": require_flag},
    reindexes=True,
    restore="positions, calibration of what is left",
    needs="attention of the prompt's last token, one layer ahead",
    source="2410.17247",
    about="the highest attention of the prompt's last token, fewer from stage to stage",
)
