"""LLaVA-1.5 and its like: a ViT, a projector, a language model with plain RoPE."""

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
    watch_attention,
    watch_projector,
)

TOWER_METRIC = ("vispruner",)  # methods that compare the tower's features, not the projected ones

# Where the ViTs have their layers, and these their attention: CLIP, SigLIP; Pixtral; InternViT.
BLOCKS = (
    ("encoder.layers", "self_attn"),
    ("transformer.layers", "attention"),
    ("encoder.layer", "attention"),
)


class Llava(Family):
    """Scores are the CLS token's attention, averaged over heads, in the layer that the features are
    taken from (`vision_feature_layer`, the deepest if there are several). A tower whose first token
    is a feature too (`vision_feature_select_strategy="full"`), or that has no CLS token, gives the
    attention received."""

    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    axes = 1
    models = "LLaVA-1.5, BakLLaVA, Pixtral-12B"
    scores_from = "CLS, in the layer of the features; received, where the tower has no CLS"

    merges: ClassVar[bool] = False  # several patches into a token: methods compare the tokens

    @property
    def tower(self) -> nn.Module:
        return self.inner.vision_tower

    @property
    def feature_layer(self) -> int | list[int]:
        return self.model.config.vision_feature_layer

    def watch(self, patches: Patches, settings: Settings) -> None:
        if settings.method in TOWER_METRIC and not self.merges:
            watch_projector(patches, self.inner.multi_modal_projector)
        if settings.needs_scores:
            strategy = getattr(self.model.config, "vision_feature_select_strategy", "full")
            score = cls_attention if strategy == "default" else received_attention
            watch_attention(patches, self._scored_attention(), score)

    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        asked, own = inputs.get("vision_feature_layer"), self.feature_layer
        if asked is not None and asked != own:
            raise NotImplementedError(
                f"vision_feature_layer must be the config's, {own}, which the scores are read "
                f"from, got {asked}; set it in model.config before attaching"
            )
        patches = record.attention[-1]
        rows = self.of_tokens(patches.reshape(*patches.shape[:2], -1), record, inputs)
        return rows.flatten() if patches.dim() == 2 else rows

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        """What the features have [sum of tokens, D], from what the tower's tokens have
        [images, P, D]: the mean over those that merge."""
        return patches.flatten(0, 1)

    def _scored_attention(self) -> nn.Module:
        layers, attention = self._blocks()
        if layers is None or not hasattr(layers[-1], attention):
            tower = type(self.tower).__name__
            raise NotImplementedError(
                f"method: scores can be read from a ViT with encoder.layers of self_attn, got a "
                f"{tower}; choose a method that needs no scores"
            )
        own = self.feature_layer
        # Hidden state i is what layer i - 1 left; counted from the end they agree.
        indices = [i - 1 if i >= 0 else i + len(layers) for i in _as_list(own)]
        if max(indices) < 0:
            raise ValueError(
                f"method: vision_feature_layer {own} is before the first attention: there are no "
                "scores; choose a method that needs none"
            )
        return getattr(layers[max(indices)], attention)

    def _blocks(self) -> tuple[Any, str]:
        """The tower's layers, and the name of their attention; None if they are nowhere."""
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
