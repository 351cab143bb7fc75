"""What an attached model did with the last prompt that it reduced."""

from dataclasses import dataclass

from restore_ext.hf.plan import SequencePlan
from restore_ext.reduction import Reduction


@dataclass(frozen=True)
class ImageReport:
    row: int  # of the batch the language model saw; beams of a row count
    start: int  # index of its first token in the row, before the reduction
    tokens_before: int
    tokens_after: int
    reduction: Reduction  # of this image alone, B = 1: source maps, what was kept and merged


@dataclass(frozen=True)
class LayerReport:
    """A decoder layer after the prompt, the conversation before it included."""

    tokens_before: int  # what the sequence would be, padding included
    tokens_after: int
    kv_bytes: int  # of keys and values


@dataclass(frozen=True)
class Report:
    images: list[ImageReport]
    layers: list[LayerReport]
    plan: SequencePlan
    kv_bytes: int  # of all layers
    kv_bytes_stock: int  # what they would be
