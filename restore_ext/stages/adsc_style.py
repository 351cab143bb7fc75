"""Uniform downsampling at chosen layers, after ADSC, whose training is not reproduced."""

from torch import Tensor

from restore_ext.checks import require_count
from restore_ext.stages.checks import require_layers, require_offset
from restore_ext.stages.select import every
from restore_ext.stages.stage import Candidates, Request, Stage, StageMethod, as_groups

PUBLISHED_LAYERS = (8, 16)  # ours: the paper's choice of layers is not known


def stages(
    request: Request,
    *,
    layers: tuple[int, ...] | None = None,
    stride: int = 2,
    offset: int = 0,
) -> tuple[Stage, ...]:
    """Every `stride`-th token of an image, from token `offset` on, at the input of every layer of
    `layers`; no scores. The idea of Attention-Driven Self-Compression (arXiv 2602.12618), in which
    a model trained for it moves what matters into the tokens left; nothing is trained here.

    An image keeps ceil((n - offset) / stride) tokens a cut, n being what it has there, and at least
    one. Positions stay, with and without RESTORE. Layers (8 and 16 of 32, scaled to the depth of
    the model), stride and offset are ours: the paper's were not to be had.
    """
    if layers is None:
        layers = tuple(sorted({request.scaled(layer) for layer in PUBLISHED_LAYERS}))

    def counts(n: int, now: int) -> tuple[int, int]:
        start = min(offset, max(now - 1, 0))
        return len(range(start, now, stride)), start

    def select(tokens: Candidates) -> Tensor:
        return as_groups(every(tokens, tokens.counts[1], stride))

    return tuple(Stage(layer, counts, select, "none") for layer in layers)


ADSC_STYLE = StageMethod(
    stages,
    {"layers": require_layers, "stride": require_count, "offset": require_offset},
    budget=False,
    source="2602.12618",
    about="every second, at chosen layers; the paper's training is not reproduced",
)
