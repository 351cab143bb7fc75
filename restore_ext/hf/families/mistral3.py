"""Mistral Small 3.1 and later: a Pixtral for images of any size, s x s patches make a token."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from restore_ext.hf.families.vit import Vit
from restore_ext.hf.vision import Record


class Mistral3(Vit):
    """A token's score is the mean of its patches'. Row breaks between image tokens are text."""

    name = "mistral3"
    model_class = "Mistral3ForConditionalGeneration"
    models = "Mistral Small 3.1 and 3.2"
    scores_from = "received, in the layer of the features, mean over the patches of a token"
    whole_tower = "which makes a token of several patches"
    smaller_pictures = "give its processor a smaller size['longest_edge']"
    notes = "row breaks are text"
    merges = True

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        config = self.model.config
        patch, side = config.vision_config.patch_size, config.spatial_merge_size
        sizes = [(int(h) // patch, int(w) // patch) for h, w in inputs["image_sizes"]]
        images = patches.flatten(0, 1).split([h * w for h, w in sizes])
        pairs = zip(images, sizes, strict=True)
        pooled = [avg_pool2d(image.T.unflatten(1, size), side) for image, size in pairs]
        return torch.cat([image.flatten(1).T for image in pooled])
