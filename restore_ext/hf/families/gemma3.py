"""Gemma 3: a SigLIP, a projector that pools its patches, a language model of sliding windows in
most layers, of two RoPEs, in which an image sees itself forward and back."""

from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.compat import window_cuts_images
from restore_ext.hf.families.vit import Vit
from restore_ext.hf.vision import Record


class Gemma3(Vit):
    """A token's score is the mean of its patches'. A window counts the positions that RoPE turns
    by, which are those of the prompt as it came unless positions="reindex"."""

    name = "gemma3"
    model_class = "Gemma3ForConditionalGeneration"
    models = "Gemma 3"
    scores_from = "received, in the last layer, mean over the patches of a token"
    whole_tower = "which makes a token of several patches"
    notes = "images stay bidirectional, windows count original positions; attach() only"
    merges = True
    feature_layer = -1

    @property
    def window_cuts_blocks(self) -> bool:
        return window_cuts_images(self.inner)

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        kinds = inputs.get("token_type_ids")
        return None if kinds is None else torch.where(kinds == 1, 0, -1)

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        projector = self.inner.multi_modal_projector
        side = projector.patches_per_image
        pooled = projector.avg_pool(patches.mT.unflatten(-1, (side, side)))
        return pooled.flatten(2).mT.flatten(0, 1)
