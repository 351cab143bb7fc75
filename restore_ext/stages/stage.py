"""What a cut inside the language model is, and what it is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Where the scores of a stage's tokens come from: attention paid to them, averaged over heads,
SCORES = (
    "attention",  # by the last token of the prompt, in the layer before the cut
    "raters",  # by the text tokens that look at the image (SparseVLM), in the layer before the cut
    "lookahead",  # by the last token of the prompt, in the layer behind the cut, asked beforehand
    "none",
)


@dataclass(frozen=True)
class Candidates:
    """I images of at most N tokens each, in the order of the sequence; padded on the right."""

    scores: Tensor  # [I, N] float32, higher is better; zeros where a stage has none
    valid: Tensor  # [I, N] bool, False where padded
    size: Tensor  # [I, N] float32, how many original tokens each stands for
    counts: tuple[Tensor, ...]  # [I] int64 each: what Stage.counts said of every image
    most: tuple[int, ...]  # of each of these, the largest: known without asking the device
    hidden: Callable[[], Tensor]  # () -> [I, N, C], the tokens' hidden states


@dataclass(frozen=True)
class Stage:
    """A cut at the input of one decoder layer.

    layer   1 to depth - 1: this layer and those behind it see what is left
    counts  (tokens of an image at the first layer, tokens it has now) -> how many it has then, in
            0..now; more numbers may follow, for `select` alone. Asked on the host, beforehand.
    select  Candidates -> [I, N] int64: -1 for a token that goes, else which of the tokens left it
            joins, in 0..counts[0]-1, none of them empty
    scores  one of SCORES
    merges  whether tokens may join; False: each of those left is one token
    """

    layer: int
    counts: Callable[[int, int], tuple[int, ...]]
    select: Callable[[Candidates], Tensor]
    scores: str = "attention"
    merges: bool = False


@dataclass(frozen=True)
class Request:
    """What the stages of a method are to be made for."""

    depth: int  # decoder layers
    keep: int | None
    keep_ratio: float | None
    retain: float  # see reduce_tokens: what a stage that merges needs to know
    anchor_mode: str

    def share(self, n: int, default: float) -> float:
        """The budget as a share of the n tokens of an image."""
        if self.keep is not None:
            return min(1.0, self.keep / n)
        return default if self.keep_ratio is None else self.keep_ratio

    def scaled(self, layer: int, of: int = 32) -> int:
        """A layer that was published for a model of `of` layers, in this one."""
        return scaled_layer(layer, self.depth, of)


def scaled_layer(layer: int, depth: int, of: int = 32) -> int:
    """A layer that was published for a model of `of` layers, in one of `depth`."""
    return min(max(1, round(layer * depth / of)), depth - 1)


@dataclass(frozen=True)
class StageMethod:
    """A way to cut inside the language model.

    make      (request, **options) -> its stages
    options   the names of its options, each with the check that refuses a bad value
    budget    whether it takes keep or keep_ratio
    reindexes whether, without RESTORE, it counts the positions of what is left anew
    restore   what RESTORE adds to it
    does      picks, merges, or another, see methods.catalogue.Card
    needs     what it reads beyond the tokens
    source    of the paper on arXiv, as its number; none: there is no paper
    about     what it keeps, in one line
    """

    make: Callable[..., tuple[Stage, ...]]
    options: Mapping[str, Callable[[str, Any], object]] = field(default_factory=dict)
    budget: bool = True
    reindexes: bool = False
    restore: str = "calibration of what is left"
    does: str = "picks"
    needs: str = ""
    source: str | None = None
    about: str = ""


def as_groups(kept: Tensor) -> Tensor:
    """The groups of tokens that stay alone, from a mask [I, N]."""
    return torch.where(kept, kept.cumsum(1) - 1, -1)
