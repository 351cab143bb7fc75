"""A tiny Qwen2.5-VL: pictures of any even size, 2 x 2 patches to a token."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import (
    IMAGE,
    MROPE_SECTION,
    PATCH,
    VERSION,
    VIDEO,
    VISION_END,
    VISION_START,
    Picture,
    Tiny,
    Video,
)


def config(text: dict[str, Any]) -> Any:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": MROPE_SECTION}
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": text["hidden_size"],
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        },
        text_config={**text, "rope_theta": 10000.0, "rope_scaling": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    patches = picture.height * picture.width
    pixels = torch.randn(patches, 3 * 2 * PATCH**2, generator=generator)
    grid = torch.tensor([[1, picture.height, picture.width]])
    ids = [VISION_START, *[IMAGE] * (patches // 4), VISION_END]
    return ids, {"pixel_values": pixels, "image_grid_thw": grid}


def per_row(input_ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (input_ids == IMAGE).long()} if VERSION >= (5, 0) else {}


QWEN2_5_VL = Tiny("Qwen2_5_VLForConditionalGeneration", config, encode, per_row=per_row)
