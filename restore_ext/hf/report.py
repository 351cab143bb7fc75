"""What an attached model did with the last prompt that it reduced."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from restore_ext.hf.plan import SequencePlan
from restore_ext.hf.step import Step
from restore_ext.hf.vision import IMAGE, VIDEO
from restore_ext.reduction import Reduction


@dataclass(frozen=True)
class ImageReport:
    """An image, or a frame of a video."""

    row: int  # of the batch the language model saw; beams of a row count
    start: int  # index of its first token in the row, before the reduction
    tokens_before: int
    tokens_after: int
    reduction: Reduction  # of this image alone, B = 1: source maps, what was kept and merged
    is_frame: bool = False  # of a video that the model takes as such


@dataclass(frozen=True)
class LayerReport:
    """A decoder layer after the prompt, the conversation before it included."""

    tokens_before: int  # what the sequence would be, padding included
    tokens_after: int
    kv_bytes: int  # of keys and values
    visual: list[int]  # tokens left of each image, in the order of Report.images


@dataclass(frozen=True)
class StageReport:
    """A cut inside the language model, once its layer has run."""

    layer: int  # the first that sees what is left
    tokens_before: list[int]  # of each image
    tokens_after: list[int]
    plan: Step  # which token went where, from those of the layer before to those of this one


@dataclass(frozen=True)
class Report:
    images: list[ImageReport]
    layers: list[LayerReport]
    plan: SequencePlan  # what went into the first layer
    kv_bytes: int  # of all layers
    kv_bytes_stock: int  # what they would be
    stages: list[StageReport] = field(default_factory=list)

    @property
    def source(self) -> Tensor:
        """[B, T] int64, which token of the prompt each logit belongs to; 0 where padded."""
        source = self.plan.source
        for stage in self.stages:
            source = stage.plan.gather(source)
        return source


@dataclass(frozen=True)
class VisualTokens:
    """How many there are: of the prompt, in the first decoder layer and in the last.

    Separators with an image's or a video's placeholder count too: newlines of LLaVA-NeXT and
    LLaVA-OneVision, which are always kept.
    """

    prompt: int
    first_layer: int
    last_layer: int

    @staticmethod
    def count(input_ids: Tensor, config: Any, report: Report | None) -> "VisualTokens":
        """Of the prompts input_ids [B, S] of a model with this config, of which `report` says what
        was reduced, if anything."""
        ids = [getattr(config, f"{kind}_token_id", None) for kind in (IMAGE, VIDEO)]
        prompt = int(sum((input_ids == token).sum() for token in ids if token is not None))
        if report is None:
            return VisualTokens(prompt, prompt, prompt)
        saved = sum(image.tokens_before - image.tokens_after for image in report.images)
        cut = sum(sum(stage.tokens_before) - sum(stage.tokens_after) for stage in report.stages)
        return VisualTokens(prompt, prompt - saved, prompt - saved - cut)

    def __str__(self) -> str:
        """What decoder layers have, in words of a table."""
        first, last = self.first_layer, self.last_layer
        return str(first) if first == last else f"{first} to {last}"
