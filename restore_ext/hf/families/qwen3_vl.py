"""Qwen3-VL: as Qwen2-VL, with interleaved M-RoPE, and features of the ViT's middle added to the
first layers of the language model (DeepStack, arXiv 2406.04334)."""

from typing import TYPE_CHECKING, Any

from restore_ext.hf.families.qwen2_vl import Qwen2VL
from restore_ext.hf.images import merge_images
from restore_ext.hf.settings import Settings

if TYPE_CHECKING:
    from restore_ext.hf.cut import Cut


class Qwen3VL(Qwen2VL):
    """Scores as in Qwen2-VL. What is added later is reduced by the groups of the image's tokens."""

    name = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    models = "Qwen3-VL"
    videos = "two pictures in one frame; the time stamps between are text"
    notes = "DeepStack features are reduced too; attach() only"

    @property
    def first_cut(self) -> int:
        """Behind the layers whose output has features added to it, token by token."""
        return max(len(self.inner.visual.deepstack_visual_indexes), 1)

    def shorten(self, inputs: dict[str, Any], cut: "Cut") -> dict[str, Any]:
        added = inputs.get("deepstack_visual_embeds")
        if not added:
            return {}
        # They are in the order of the prompts, as the images, frames of videos among them.
        short = [merge_images(cut.reductions, features) for features in added]
        return {"visual_pos_masks": cut.plan.is_visual, "deepstack_visual_embeds": short}

    def require_prepared(self, settings: Settings) -> None:
        if self.inner.visual.deepstack_visual_indexes:
            raise NotImplementedError(
                "model: prepare_inputs() cannot serve Qwen3-VL: generate() takes embeddings, but "
                "not the visual features that are added in the first layers; use attach()"
            )
        super().require_prepared(settings)
