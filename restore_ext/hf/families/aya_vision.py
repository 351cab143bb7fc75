"""Aya Vision: a SigLIP, s x s of whose patches make a token, Cohere 2."""

from typing import Any

from torch import Tensor

from restore_ext.hf.families.vit import Vit, mean_of_shuffled
from restore_ext.hf.vision import Record


class AyaVision(Vit):
    """A token's score is the mean of its patches'. Tiles are images of their own."""

    name = "aya_vision"
    model_class = "AyaVisionForConditionalGeneration"
    models = "Aya Vision"
    scores_from = "received, in the layer of the features, mean over the patches of a token"
    whole_tower = "which makes a token of several patches"
    smaller_pictures = "give its processor a smaller max_patches, for fewer tiles"
    notes = "a tile counts as an image"
    merges = True

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        shuffled = self.inner.multi_modal_projector.pixel_shuffle(patches)
        return mean_of_shuffled(shuffled, patches.shape[-1])
