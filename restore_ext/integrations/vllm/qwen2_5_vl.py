"""Qwen2.5-VL: pictures of any size, in windows, and positions of three axes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from restore_ext.hf.families.qwen2_5_vl import window_order
from restore_ext.hf.tower_scores import received_attention
from restore_ext.hf.vision import Seen
from restore_ext.integrations.vllm.cpu import let_runner_ask
from restore_ext.integrations.vllm.model import Processor, Reduced, Watch
from restore_ext.integrations.vllm.options import KEY, read_options, tokens_left
from restore_ext.integrations.vllm.rows import Item
from restore_ext.methods.problem import KEYS


class QwenInfo(Qwen2_5_VLProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        settings = read_options(getattr(self.get_hf_config(), KEY), axes=3)
        return {"image": tokens_left(settings, most["image"])}


class QwenProcessor(Processor, Qwen2_5_VLMultiModalProcessor):
    axes = 3

    def span(self, image: Any, tokens: int) -> int:
        if image is None:  # in a cache on the other side; it was looked at before
            return tokens
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return max(image["image_grid_thw"].data.tolist()[1:]) // merge


@MULTIMODAL_REGISTRY.register_processor(
    QwenProcessor, info=QwenInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class RestoreQwen2_5_VL(Reduced, Qwen2_5_VLForConditionalGeneration):
    """Scores are those of attach(): the attention received in the last block of full attention.
    There are no videos."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.install(vllm_config, axes=3)
        let_runner_ask()
        self.watch: Watch | None = None
        if self.settings.needs_scores:
            last = max(self.visual.fullatt_block_indexes)
            self.watch = Watch(self.visual.blocks[last].attn.attn)

    # Where vLLM appends the positions of features, which it does while a pruning rate is set.
    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Any
    ) -> tuple[Tensor, ...]:
        grids = self._grids(image_input["image_grid_thw"])
        seen = Seen(len(grids))
        if self.watch is not None:
            query, key = self.watch.take()
            scores, keys = [], []
            for part, order in self._parts(grids):
                q, k = query[:, :, part], key[:, :, part]
                received = received_attention(q, k, self.watch.attention.scale)[0]
                scores.append(self._merged(received, order))
                keys.append(self._merged(k.mean(1)[0], order))
            seen.scores = scores
            seen.metric = keys if self.settings.chosen.metric == KEYS else None
        places = [self._places(grid, image_embeds_split[0].device) for grid in grids]
        return self.reduced(image_embeds_split, seen, places)

    def items(self, images: Sequence[Any]) -> list[Item]:
        grids = self.iter_mm_grid_thw(list(images))
        places = [image.mm_position for image in images]
        return [
            Item(place.offset, place.length, max(height, width))
            for place, (_, _, height, width, _) in zip(places, grids, strict=True)
        ]

    def is_image(self, ids: Tensor) -> Tensor:
        return ids == self.config.image_token_id

    def _grids(self, patches: Tensor) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of tokens of each image."""
        merge = self.visual.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in patches.tolist()]

    def _places(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        return torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid))

    def _parts(self, grids: Sequence[tuple[int, int, int]]) -> Iterator[tuple[slice, Tensor]]:
        """Of each picture its patches in the tower, and its tokens in the tower's order."""
        merge = self.visual.spatial_merge_size
        side = self.visual.window_size // merge // self.visual.patch_size
        first = 0
        for frames, height, width in grids:
            past = first + frames * height * width * merge**2
            yield slice(first, past), window_order(frames, height, width, side)
            first = past

    def _merged(self, patches: Tensor, order: Tensor) -> Tensor:
        """Means over the patches of a token, in raster order."""
        merged = patches.unflatten(0, (-1, self.visual.spatial_merge_size**2)).mean(1)
        return torch.empty_like(merged).index_copy(0, order.to(merged.device), merged)
