"""Qwen2.5-VL: a ViT of windows that merges 2 x 2 patches, a language model with M-RoPE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.families.qwen2_vl import Qwen2VL
from restore_ext.hf.vision import Record


class Qwen2_5_VL(Qwen2VL):
    """There is no CLS token: scores are the attention a patch receives in the last block of full
    attention, averaged over heads and queries of its image, and over the patches that merge into
    one token; keys likewise. Methods that do not ask for keys compare the merged features."""

    name = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    models = "Qwen2.5-VL"
    scores_from = "received, in the last block of full attention"

    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        merged = super().scores(record, tokens, inputs)
        visual = self.inner.visual
        merge = visual.spatial_merge_size
        side = visual.window_size // merge // visual.patch_size
        scores, first = torch.empty_like(merged), 0
        for frames, height, width in inputs[f"{record.kind}_grid_thw"].tolist():
            order = window_order(frames, height // merge, width // merge, side)
            order = first + order.to(merged.device)
            scores[order] = merged[first : first + len(order)]
            first += len(order)
        return scores

    def _scored_block(self) -> Any:
        full = self.inner.visual.fullatt_block_indexes
        if not full:
            raise ValueError(
                "method: vision_config.fullatt_block_indexes is empty, so there are no scores; "
                "choose a method that needs none"
            )
        return self.inner.visual.blocks[max(full)]


def window_order(frames: int, height: int, width: int, side: int) -> Tensor:
    """The raster index of every token in the order the tower works in: window after window of
    side x side tokens, frame by frame, raster order in each window."""
    t, y, x = torch.meshgrid(
        torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    across = -(-width // side)
    window = (t * -(-height // side) + y // side) * across + x // side
    return window.flatten().argsort(stable=True)
