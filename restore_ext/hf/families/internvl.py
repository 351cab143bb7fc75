"""InternVL, in transformers' own class: InternViT, whose patches are shuffled 2 x 2 into a token."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_ext.hf.families.llava import Llava
from restore_ext.hf.vision import Record


class InternVL(Llava):
    """A token's score is the mean of its patches'. Tiles and frames are images of their own."""

    name = "internvl"
    model_class = "InternVLForConditionalGeneration"
    models = "InternVL 2.5, 3 and 3.5 (-hf)"
    scores_from = "CLS, in the layer of the features, mean over the patches of a token"
    notes = "a tile, or a frame of a video, counts as an image"
    merges = True

    def of_tokens(
        self, scores: Tensor, record: Record, inputs: dict[str, Any]
    ) -> Sequence[Tensor] | Tensor:
        side = int(scores.shape[1] ** 0.5)
        ratio = self.model.config.downsample_ratio
        shuffled = self.inner.pixel_shuffle(scores.view(-1, side, side, 1), scale_factor=ratio)
        return shuffled.mean(-1).flatten()
