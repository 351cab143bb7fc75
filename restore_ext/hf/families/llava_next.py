"""LLaVA-NeXT (1.6): an image is an overview and tiles, whose rows end in a newline feature."""

from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.families.vit import Vit
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import Record, watch_packing


class LlavaNext(Vit):
    """The overview and the tiles of an image share its budget; the newlines stay, as text does.

    The model packs the tiles (puts them side by side, cuts off the padding, adds the newlines) by
    pack_image_features(); what is known of the tiles' tokens is packed by it too.
    """

    name = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"
    models = "LLaVA-NeXT (LLaVA-1.6)"
    scores_from = "CLS, in the layer of the features"
    whole_tower = "which puts the tiles of an image together and cuts their edges off"
    smaller_pictures = "give its processor smaller image_grid_pinpoints"
    notes = "an image's tiles share its budget; newlines are kept, and never reduced"

    def watch(self, patches: Patches, settings: Settings) -> None:
        super().watch(patches, settings)
        watch_packing(patches, self.inner)

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        assert record.packing is not None
        return torch.cat(record.packing.without_newlines(patches))

    def metric(self, record: Record) -> Tensor:
        assert record.packing is not None and record.tower is not None
        return torch.cat(record.packing.without_newlines(record.tower))

    def visual(self, record: Record) -> list[Tensor] | None:
        assert record.packing is not None
        return record.packing.visual
