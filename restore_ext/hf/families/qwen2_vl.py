"""Qwen2-VL: a ViT that merges 2 x 2 patches, a language model with M-RoPE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.families.family import Family
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.tower_scores import received_attention
from restore_ext.hf.vision import Record, watch_attention


class Qwen2VL(Family):
    """There is no CLS token: scores are the attention a patch receives in the last block, averaged
    over heads and queries of its image, and over the patches that merge into one token; keys
    likewise. Methods that do not ask for keys compare the merged features."""

    name = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"
    axes = 3
    models = "Qwen2-VL"
    scores_from = "received, in the last block"
    videos = "two pictures in one frame"
    video_token_name = "video_token_id"
    whole_tower = "which makes a token of several patches"
    smaller_pictures = "give its processor a smaller max_pixels"

    def watch(self, patches: Patches, settings: Settings) -> None:
        if settings.needs_scores:
            watch_attention(patches, self._scored_block().attn, received_attention)

    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        patches = torch.cat([call[0] for call in record.attention])  # frame after frame
        return patches.unflatten(0, (-1, self.inner.visual.spatial_merge_size**2)).mean(1)

    def frames(self, inputs: dict[str, Any]) -> list[list[int]]:
        merge = self.inner.visual.spatial_merge_size
        grids = inputs["video_grid_thw"].tolist()
        return [[height * width // merge**2] * frames for frames, height, width in grids]

    def _scored_block(self) -> Any:
        return self.inner.visual.blocks[-1]
