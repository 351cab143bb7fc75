"""InternVL, in transformers' own class: an InternViT, 2 x 2 of whose patches make a token."""

from typing import Any

from torch import Tensor

from restore_ext.hf.families.vit import Vit, mean_of_shuffled
from restore_ext.hf.vision import Record


class InternVL(Vit):
    """A token's score is the mean of its patches'. Tiles and frames are images of their own."""

    name = "internvl"
    model_class = "InternVLForConditionalGeneration"
    models = "InternVL 3 and 3.5 (-hf)"
    scores_from = "CLS, in the layer of the features, mean over the patches of a token"
    videos = "frames come as images"
    notes = "a tile counts as an image"
    whole_tower = "which makes a token of several patches"
    smaller_pictures = "give its processor a smaller max_patches, for fewer tiles"
    merges = True

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        side = int(patches.shape[1] ** 0.5)
        ratio = self.model.config.downsample_ratio
        picture = patches.unflatten(1, (side, side))
        shuffled = self.inner.pixel_shuffle(picture, scale_factor=ratio)
        return mean_of_shuffled(shuffled, patches.shape[-1])
