"""Qwen3-VL: as Qwen2-VL, with interleaved M-RoPE, and features of the ViT's middle added to the
first layers of the language model (DeepStack, arXiv 2406.04334)."""

from typing import TYPE_CHECKING, Any

import torch

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
    notes = "DeepStack features are reduced too; videos are left as they are; attach() only"

    @property
    def first_cut(self) -> int:
        """Behind the layers whose output has features added to it, token by token."""
        return max(len(self.inner.visual.deepstack_visual_indexes), 1)

    def shorten(self, inputs: dict[str, Any], cut: "Cut") -> dict[str, Any]:
        mask, added = inputs.get("visual_pos_masks"), inputs.get("deepstack_visual_embeds")
        if mask is None or not added:
            return {}
        plan, mask = cut.plan, mask.to(cut.is_image.device)
        short_mask = plan.gather(mask) & plan.valid
        before = sum(r.group.shape[1] for r in cut.reductions)
        after = sum(r.position.shape[1] for r in cut.reductions)
        images = torch.nonzero_static(cut.is_image.flatten(), size=before)[:, 0]
        # A video's are among them, and stay.
        count = len(added[0]) - before + after
        left = torch.nonzero_static(short_mask.flatten(), size=count)[:, 0]
        short = []
        for features in added:
            features = features.to(mask.device)
            full = features.new_zeros(*mask.shape, features.shape[-1])
            full = full.masked_scatter(mask[..., None], features)
            tokens = merge_images(cut.reductions, full.flatten(0, 1)[images])
            short.append(plan.shorten(full, tokens).flatten(0, 1)[left])
        return {"visual_pos_masks": short_mask, "deepstack_visual_embeds": short}

    def require_prepared(self, settings: Settings) -> None:
        if self.inner.visual.deepstack_visual_indexes:
            raise NotImplementedError(
                "model: prepare_inputs() cannot serve Qwen3-VL: generate() takes embeddings, but "
                "not the visual features that are added in the first layers; use attach()"
            )
        super().require_prepared(settings)
