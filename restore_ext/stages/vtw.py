"""VTW: from some layer on, no visual token at all."""

from restore_ext.checks import require_count
from restore_ext.stages.select import make_stage
from restore_ext.stages.stage import Request, Stage, StageMethod

PUBLISHED_LAYER = 15  # of the 32 of LLaVA-1.5-7B


def stages(request: Request, *, layer: int | None = None) -> tuple[Stage, ...]:
    """Visual Tokens Withdrawal (arXiv 2405.05803): all visual tokens leave at the input of `layer`.

    Text keeps its positions. The default is layer 15 of 32, scaled to the depth of the model;
    `restore_ext.find_withdrawal_layer` looks for the right one as the paper does. No visual key is
    left to calibrate, so RESTORE adds nothing but the distance term between text tokens, which is
    left out: `restore` changes nothing here.
    """
    at = request.scaled(PUBLISHED_LAYER) if layer is None else layer
    return (make_stage(at, lambda n, now: 0, "none", False, request),)


VTW = StageMethod(
    stages,
    {"layer": require_count},
    budget=False,
    restore="nothing",
    does="drops all",
    source="2405.05803",
    about="all of them up to some layer, none from there on",
)
