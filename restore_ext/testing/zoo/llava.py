"""A tiny LLaVA: every picture is 8 x 8 patches, 64 tokens."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, LLAVA_SIDE, PATCH, Picture, Tiny, Video
from restore_ext.testing.zoo.towers import clip


def config(text: dict[str, Any]) -> Any:
    return transformers.LlavaConfig(
        vision_config=clip(LLAVA_SIDE),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=LLAVA_SIDE**2,
    )


def encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    side = LLAVA_SIDE * PATCH
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return [IMAGE] * LLAVA_SIDE**2, {"pixel_values": pixels}


LLAVA = Tiny("LlavaForConditionalGeneration", config, encode)
