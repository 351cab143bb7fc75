"""Idefics3: a SigLIP, s x s of whose patches make a token, Llama."""

from typing import Any

from torch import Tensor, nn

from restore_ext.hf.families.vit import Vit, mean_of_shuffled
from restore_ext.hf.vision import Record


class Idefics3(Vit):
    """A token's score is the mean of its patches'. Tiles and frames are images of their own."""

    name = "idefics3"
    model_class = "Idefics3ForConditionalGeneration"
    models = "Idefics3"
    scores_from = "received, in the last layer, mean over the patches of a token"
    videos = "frames come as images"
    notes = "a tile counts as an image"
    whole_tower = "which makes a token of several patches"
    smaller_pictures = "give its processor a smaller size['longest_edge'], for fewer tiles"
    lm_name = "text_model"
    merges = True

    @property
    def tower(self) -> nn.Module:
        return self.inner.vision_model

    @property
    def feature_layer(self) -> int | list[int]:
        return -1

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        connector = self.inner.connector
        shuffled = connector.pixel_shuffle(patches, connector.scale_factor)
        return mean_of_shuffled(shuffled, patches.shape[-1])

    def per_image(self, inputs: dict[str, Any]) -> int | None:
        height, width = inputs["pixel_values"].shape[-2:]
        patch = self.model.config.vision_config.patch_size
        return (height // patch) * (width // patch) // self.model.config.scale_factor**2
