"""Gemma 3: a SigLIP, a projector that pools its patches, a language model of sliding windows in
most layers, of two RoPEs, in which an image sees itself forward and back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.compat import window_cuts_images
from restore_ext.hf.families.family import Family
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import Record, last_attention, received_attention, watch_attention


class Gemma3(Family):
    """There is no CLS token: scores are the attention a patch receives in the tower's last layer,
    averaged over the patches that are pooled into one token. Every method compares the pooled
    features. A window counts the positions that RoPE turns by, those of the tokens as they came
    unless positions="reindex"."""

    name = "gemma3"
    model_class = "Gemma3ForConditionalGeneration"
    axes = 1
    models = "Gemma 3"
    scores_from = "received, in the last layer"
    notes = "images stay bidirectional, windows count original positions; attach() only"

    @property
    def window_cuts_blocks(self) -> bool:
        return window_cuts_images(self.inner)

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        kinds = inputs.get("token_type_ids")
        if kinds is None:
            return None
        return torch.where(kinds == 1, 0, -1)

    def watch(self, patches: Patches, settings: Settings) -> None:
        if settings.needs_scores:
            scored = last_attention(self.inner.vision_tower)
            watch_attention(patches, scored, received_attention)

    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        projector = self.inner.multi_modal_projector
        side = projector.patches_per_image
        patches = record.attention[-1].unflatten(-1, (side, side))
        return projector.avg_pool(patches[:, None]).flatten()
