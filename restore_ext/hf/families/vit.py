"""What the families with a ViT, a projector and a language model with plain RoPE have in common."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from restore_ext.hf.families.family import Family
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import (
    Record,
    cls_attention,
    received_attention,
    received_from_all,
    watch_attention,
    watch_projector,
)
from restore_ext.methods.problem import CLS, TOWER_FEATURES

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
