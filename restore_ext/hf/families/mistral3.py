"""Mistral Small 3.1 and later: a Pixtral of images of any size, s x s patches merged into a token."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool2d

from restore_ext.hf.families.llava import Llava
from restore_ext.hf.vision import Record


class Mistral3(Llava):
    """A token's score is the mean of its patches'. Row breaks between image tokens are text."""

    name = "mistral3"
    model_class = "Mistral3ForConditionalGeneration"
    models = "Mistral Small 3.1 and 3.2, Ministral 3"
    scores_from = "received, in the layer of the features, mean over the patches of a token"
    notes = "row breaks are text"
    merges = True

    def of_tokens(
        self, scores: Tensor, record: Record, inputs: dict[str, Any]
    ) -> Sequence[Tensor] | Tensor:
        patch, side = self.tower.config.patch_size, self.model.config.spatial_merge_size
        sizes = [(int(h) // patch, int(w) // patch) for h, w in inputs["image_sizes"]]
        grids = scores.flatten().split([h * w for h, w in sizes])
        return [
            avg_pool2d(grid.view(1, h, w), side).flatten()
            for grid, (h, w) in zip(grids, sizes, strict=True)
        ]
