"""LLaVA-1.5 and its like: a ViT, a projector, a language model with plain RoPE."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from restore_ext.hf.families.family import Family
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.tower import watch_smaller_pictures
from restore_ext.hf.tower_tome import watch_blocks
from restore_ext.hf.vision import (
    Record,
    Seen,
    cls_attention,
    received_attention,
    received_from_all,
    watch_attention,
    watch_projector,
)
from restore_ext.methods.problem import CLS, TOWER, TOWER_FEATURES


class Llava(Family):
    """Scores are the CLS token's attention, averaged over heads, or the attention received, in the
    layer that the features are taken from (`vision_feature_layer`, the deepest if there are
    several). A tower whose first token is a feature too (`vision_feature_select_strategy="full"`)
    gives the attention received."""

    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    axes = 1

    def watch(self, patches: Patches, settings: Settings) -> None:
        method = settings.chosen
        if method.metric == TOWER_FEATURES:
            watch_projector(patches, self.inner.multi_modal_projector)
        if method.needs_scores:
            score = cls_attention if method.scores == CLS else received_from_all
            if self.model.config.vision_feature_select_strategy != "default":
                score = received_attention
            watch_attention(patches, self._scored_attention(), score)

    def watch_tower(self, patches: Patches, settings: Settings) -> None:
        if type(self) is not Llava:  # others may cut a picture into tiles, or take any size
            return super().watch_tower(patches, settings)
        tower, projector = self.inner.vision_tower, self.inner.multi_modal_projector
        if settings.chosen.place == TOWER:
            class_token = self.model.config.vision_feature_select_strategy == "default"
            watch_blocks(patches, self._whole_blocks(settings), projector, settings, class_token)
        elif "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            watch_smaller_pictures(patches, tower, projector, settings)
        else:
            raise NotImplementedError(
                f"method {settings.method} needs a vision tower that interpolates its positions, "
                f"got a {type(tower).__name__}"
            )

    def seen(self, record: Record, features: Sequence[Tensor], inputs: dict[str, Any]) -> Seen:
        if record.settings.chosen.place == TOWER:
            self._require_own_layer(inputs)
        return super().seen(record, features, inputs)

    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        self._require_own_layer(inputs)
        return record.attention[-1].flatten(0, 1)

    def _require_own_layer(self, inputs: dict[str, Any]) -> None:
        asked, own = inputs.get("vision_feature_layer"), self.model.config.vision_feature_layer
        if asked is not None and asked != own:
            raise NotImplementedError(
                f"vision_feature_layer must be the config's, {own}, which the method "
                f"watches, got {asked}; set it in model.config before attaching"
            )

    def _scored_attention(self) -> nn.Module:
        blocks, last = self._blocks()
        return blocks[last].self_attn

    def _whole_blocks(self, settings: Settings) -> list[Any]:
        """Those in front of the features, with the parts that merging takes."""
        blocks, last = self._blocks()
        parts = ("self_attn", "layer_norm2", "mlp")
        if not all(hasattr(blocks[last], part) for part in parts):
            raise NotImplementedError(
                f"method {settings.method} needs a ViT whose blocks have {', '.join(parts)}, got a "
                f"{type(self.inner.vision_tower).__name__}"
            )
        own = self.model.config.vision_feature_layer
        if not isinstance(own, int):
            raise NotImplementedError(
                f"method {settings.method} needs the features of one layer, got "
                f"vision_feature_layer {own}"
            )
        return list(blocks)[: last + 1]

    def _blocks(self) -> tuple[Any, int]:
        """The blocks of the vision tower, and the last one that features are taken behind."""
        layers: Any = next(
            (m for n, m in self.inner.vision_tower.named_modules() if n.endswith("encoder.layers")),
            None,
        )
        if layers is None or not hasattr(layers[-1], "self_attn"):
            tower = type(self.inner.vision_tower).__name__
            raise NotImplementedError(
                f"method: scores can be read from a ViT with encoder.layers of self_attn, got a "
                f"{tower}; choose a method that needs no scores"
            )
        own = self.model.config.vision_feature_layer
        # Hidden state i is what layer i - 1 left; counted from the end they agree.
        indices = [i - 1 if i >= 0 else i + len(layers) for i in _as_list(own)]
        if max(indices) < 0:
            raise ValueError(
                f"method: vision_feature_layer {own} is before the first attention: there are no "
                "scores; choose a method that needs none"
            )
        return layers, max(indices)


def _as_list(layer: int | Sequence[int]) -> list[int]:
    return [layer] if isinstance(layer, int) else list(layer)
