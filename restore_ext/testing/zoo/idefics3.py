"""A tiny Idefics3 and SmolVLM: every picture is padded to 8 x 8 patches, 4 x 4 tokens."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, PATCH, VISION_END, VISION_START, Picture, Tiny, Video
from restore_ext.testing.zoo.towers import VIT

SIDE = 8  # patches


def idefics3_config(text: dict[str, Any]) -> Any:
    return _config(transformers.Idefics3Config, text)


def smolvlm_config(text: dict[str, Any]) -> Any:
    return _config(transformers.SmolVLMConfig, text)


def _config(kind: Any, text: dict[str, Any]) -> Any:
    return kind(
        vision_config={**VIT, "image_size": SIDE * PATCH},
        text_config=transformers.LlamaConfig(**text),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
    )


def encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    pixels = torch.randn(1, 1, 3, SIDE * PATCH, SIDE * PATCH, generator=generator)
    mask = torch.zeros(1, 1, SIDE * PATCH, SIDE * PATCH, dtype=torch.int64)
    mask[..., : picture.height * PATCH, : picture.width * PATCH] = 1
    ids = [VISION_START, *[IMAGE] * (SIDE**2 // 4), VISION_END]
    return ids, {"pixel_values": pixels, "pixel_attention_mask": mask}


IDEFICS3 = Tiny("Idefics3ForConditionalGeneration", idefics3_config, encode, image_dim=1)
SMOLVLM = Tiny("SmolVLMForConditionalGeneration", smolvlm_config, encode, image_dim=1)
