"""A tiny Aya Vision: tiles of 8 x 8 patches, 2 x 2 to a token; a Cohere 2 of sliding windows, whose
layers of full attention have no RoPE."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, LLAVA_SIDE, PATCH, Picture, Tiny, Video
from restore_ext.testing.zoo.towers import siglip

WINDOW = 12  # less than an image, so that it cuts one


def config(text: dict[str, Any]) -> Any:
    return transformers.AyaVisionConfig(
        vision_config=siglip(LLAVA_SIDE),
        text_config=transformers.Cohere2Config(
            **{
                "head_dim": 32,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                **text,
            }
        ),
        image_token_index=IMAGE,
        downsample_factor=2,
        tie_word_embeddings=False,
    )


def encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    side = LLAVA_SIDE * PATCH
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return [IMAGE] * (LLAVA_SIDE**2 // 4), {"pixel_values": pixels}


AYA_VISION = Tiny("AyaVisionForConditionalGeneration", config, encode)
