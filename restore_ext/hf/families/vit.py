"""What the families with a ViT, a projector and a language model with plain RoPE have in common."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from restore_ext.hf.families.family import Family
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.tower import watch_smaller_pictures
from restore_ext.hf.tower_scores import cls_attention, received_attention, received_from_all
from restore_ext.hf.tower_tome import require_budget, watch_blocks
from restore_ext.hf.vision import Record, Seen, watch_attention, watch_projector
from restore_ext.methods.problem import CLS, TOWER, TOWER_FEATURES

# Where the ViTs have their blocks, and these their attention: CLIP, SigLIP; Pixtral; InternViT.
BLOCKS = (
    ("encoder.layers", "self_attn"),
    ("transformer.layers", "attention"),
    ("encoder.layer", "attention"),
)


class Vit(Family):
    """Scores are the CLS token's attention, averaged over heads, or the attention received, in the
    layer that the features are taken from (`vision_feature_layer`, the deepest if there are
    several). A tower whose first token is a feature too (`vision_feature_select_strategy="full"`),
    or that has no CLS token, gives the attention received."""

    axes = 1
    merges: ClassVar[bool] = False  # several patches into a token: methods compare the tokens

    @property
    def tower(self) -> nn.Module:
        return self.inner.vision_tower

    @property
    def feature_layer(self) -> int | list[int]:
        return self.model.config.vision_feature_layer

    @property
    def class_token(self) -> bool:
        """Whether the tower's first token is a CLS token, which is no feature."""
        config = self.model.config
        return getattr(config, "vision_feature_select_strategy", "full") == "default"

    def watch(self, patches: Patches, settings: Settings) -> None:
        method = settings.chosen
        if method.metric == TOWER_FEATURES and not self.merges:
            watch_projector(patches, self.inner.multi_modal_projector)
        if method.needs_scores:
            score = cls_attention if method.scores == CLS else received_from_all
            score = score if self.class_token else received_attention
            blocks, attention, last = self.blocks_of_tower()
            watch_attention(patches, getattr(blocks[last], attention), score)

    def watch_tower(self, patches: Patches, settings: Settings) -> None:
        if self.whole_tower:
            super().watch_tower(patches, settings)
        tower, projector = self.tower, self.inner.multi_modal_projector
        if settings.chosen.place == TOWER:
            blocks = self._whole_blocks(settings)
            require_budget(tower, len(blocks), settings, self.class_token)
            watch_blocks(patches, blocks, self.behind_blocks, projector, settings, self.class_token)
        elif "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            watch_smaller_pictures(patches, tower, projector, settings)
        else:
            raise NotImplementedError(
                f"method {settings.method} needs a vision tower that interpolates its positions, "
                f"got a {type(tower).__name__}"
            )

    @property
    def behind_blocks(self) -> nn.Module:
        """What the last block's tokens go through next, on their way to the features."""
        return self.inner.multi_modal_projector

    def images(
        self, record: Record, output: Any, inputs: dict[str, Any]
    ) -> tuple[list[Tensor], Seen]:
        if record.settings.chosen.place == TOWER:
            self.require_own_layer(inputs)
        features, seen = super().images(record, output, inputs)
        if seen.reduced is not None:
            settings, reductions = seen.reduced
            # 4.57: PaliGemma scales what its projector returns.
            pairs = zip(reductions, features, strict=True)
            scaled = [dataclasses.replace(r, tokens=image[r.position]) for r, image in pairs]
            seen.reduced = settings, scaled
        return features, seen

    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        self.require_own_layer(inputs)
        patches = record.attention[-1]
        rows = self.of_tokens(patches.reshape(*patches.shape[:2], -1), record, inputs)
        return rows.flatten() if patches.dim() == 2 else rows

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        """What the features have [sum of tokens, D], from what the tower's tokens have
        [images, P, D]: the mean over those that merge."""
        return patches.flatten(0, 1)

    def require_own_layer(self, inputs: dict[str, Any]) -> None:
        asked, own = inputs.get("vision_feature_layer"), self.feature_layer
        if asked is not None and asked != own:
            raise NotImplementedError(
                f"vision_feature_layer must be the config's, {own}, which the method "
                f"watches, got {asked}; set it in model.config before attaching"
            )

    def blocks_of_tower(self) -> tuple[Any, str, int]:
        """The blocks of the vision tower, the name of their attention, and the last one that
        features are taken behind."""
        blocks, attention = self._blocks()
        if blocks is None or not hasattr(blocks[-1], attention):
            tower = type(self.tower).__name__
            raise NotImplementedError(
                f"method: scores can be read from a ViT with encoder.layers of self_attn, got a "
                f"{tower}; choose a method that needs no scores"
            )
        own = self.feature_layer
        # Hidden state i is what layer i - 1 left; counted from the end they agree.
        indices = [i - 1 if i >= 0 else i + len(blocks) for i in _as_list(own)]
        if max(indices) < 0:
            raise ValueError(
                f"method: vision_feature_layer {own} is before the first attention: there are no "
                "scores; choose a method that needs none"
            )
        return blocks, attention, max(indices)

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

    def _blocks(self) -> tuple[Any, str]:
        for path, attention in BLOCKS:
            for name, module in self.tower.named_modules():
                if name == path or name.endswith("." + path):
                    return module, attention
        return None, ""


def _as_list(layer: int | Sequence[int]) -> list[int]:
    return [layer] if isinstance(layer, int) else list(layer)


def mean_of_shuffled(shuffled: Tensor, width: int) -> Tensor:
    """Pixel-shuffled [images, ..., s * s * width] as [all tokens, width], the mean over patches."""
    return shuffled.unflatten(-1, (-1, width)).mean(-2).flatten(0, -2)
