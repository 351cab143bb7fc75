"""A tiny LLaVA: every picture is 8 x 8 patches, 64 tokens."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, LLAVA_SIDE, PATCH, Picture, Tiny, Video

SIDE = LLAVA_SIDE * PATCH  # pixels


def clip(**settings: Any) -> Any:
    """The config of a tiny CLIP."""
    return transformers.CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 32,
            **settings,
        }
    )


def config(text: dict[str, Any]) -> Any:
    return transformers.LlavaConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=LLAVA_SIDE**2,
    )


def encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return [IMAGE] * LLAVA_SIDE**2, {"pixel_values": pixels}


LLAVA = Tiny("LlavaForConditionalGeneration", config, encode)
