"""A tiny InternVL: every picture, and every frame of a video, is 8 x 8 patches, 4 x 4 tokens."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, PATCH, VISION_END, VISION_START, Picture, Tiny, Video
from restore_ext.testing.zoo.towers import VIT

SIDE = 8  # patches


def config(text: dict[str, Any]) -> Any:
    return transformers.InternVLConfig(
        vision_config={
            **VIT,
            "image_size": [SIDE * PATCH] * 2,
            "patch_size": [PATCH] * 2,
            "use_absolute_position_embeddings": True,
        },
        text_config=transformers.Qwen2Config(**text),
        image_token_id=IMAGE,
        image_seq_length=SIDE**2 // 4,
    )


def encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    frames = getattr(picture, "frames", 1)
    pixels = torch.randn(frames, 3, SIDE * PATCH, SIDE * PATCH, generator=generator)
    frame = [VISION_START, *[IMAGE] * (SIDE**2 // 4), VISION_END]
    return frame * frames, {"pixel_values": pixels}


INTERNVL = Tiny("InternVLForConditionalGeneration", config, encode, videos=True)
