"""FastV: behind an early layer, the tokens that the end of the prompt attends to."""

from restore_ext.checks import require_count, require_flag
from restore_ext.stages.select import make_stage, share_of
from restore_ext.stages.stage import Request, Stage, StageMethod


def stages(request: Request, *, layer: int = 2, merge: bool = False) -> tuple[Stage, ...]:
    """FastV (arXiv 2403.06764): one cut at the input of `layer` (the paper's K = 2).

    An image keeps the tokens that the last token of the prompt attends to most in layer - 1,
    averaged over heads: `keep` of them, or round(keep_ratio * n), half by default (R = 0.5). All
    keep their positions, with and without RESTORE, as in the released code.

    merge  the others are merged into distinctive anchors, see make_stage
    """

    def count(n: int, now: int) -> int:
        return min(now, share_of(n, request.share(n, 0.5)))

    return (make_stage(layer, count, "attention", merge, request),)


FASTV = StageMethod(
    stages,
    {"layer": require_count, "merge": require_flag},
    needs="attention of the prompt's last token",
    source="2403.06764",
    about="the highest attention of the prompt's last token, at an early layer",
)
