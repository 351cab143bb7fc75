"""LLaVA-1.5 and its like: every picture is one grid of patches, and every patch a token."""

import inspect
from typing import Any

from torch import Tensor

from restore_ext.hf.families.vit import Vit
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.tower import watch_smaller_pictures
from restore_ext.hf.tower_tome import require_budget, watch_blocks
from restore_ext.hf.vision import Record, Seen
from restore_ext.methods.problem import TOWER


class Llava(Vit):
    """Methods may act on the picture, or in the tower, where its blocks are CLIP's."""

    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    models = "LLaVA-1.5, BakLLaVA, Pixtral-12B"
    scores_from = "CLS, in the layer of the features; received, where the tower has no CLS"

    def watch_tower(self, patches: Patches, settings: Settings) -> None:
        tower, projector = self.inner.vision_tower, self.inner.multi_modal_projector
        if settings.chosen.place == TOWER:
            blocks = self._whole_blocks(settings)
            require_budget(tower, len(blocks), settings, self.class_token)
            watch_blocks(patches, blocks, projector, settings, self.class_token)
        elif "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            watch_smaller_pictures(patches, tower, projector, settings)
        else:
            raise NotImplementedError(
                f"method {settings.method} needs a vision tower that interpolates its positions, "
                f"got a {type(tower).__name__}"
            )

    def images(
        self, record: Record, output: Any, inputs: dict[str, Any]
    ) -> tuple[list[Tensor], Seen]:
        if record.settings.chosen.place == TOWER:
            self.require_own_layer(inputs)
        return super().images(record, output, inputs)

    def _whole_blocks(self, settings: Settings) -> list[Any]:
        """Those in front of the features, with the parts that merging takes."""
        blocks, _, last = self.blocks_of_tower()
        parts = ("self_attn", "layer_norm2", "mlp")
        if not all(hasattr(blocks[last], part) for part in parts):
            raise NotImplementedError(
                f"method {settings.method} needs a ViT whose blocks have {', '.join(parts)}, got a "
                f"{type(self.tower).__name__}"
            )
        if not isinstance(self.feature_layer, int):
            raise NotImplementedError(
                f"method {settings.method} needs the features of one layer, got "
                f"vision_feature_layer {self.feature_layer}"
            )
        return list(blocks)[: last + 1]
