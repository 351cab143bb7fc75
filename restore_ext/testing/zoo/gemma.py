"""Tiny PaliGemma and Gemma 3: every picture is 8 x 8 patches; Gemma 3 pools 2 x 2 to a token."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import (
    IMAGE,
    LLAVA_SIDE,
    PATCH,
    VISION_END,
    VISION_START,
    Picture,
    Tiny,
    Video,
)
from restore_ext.testing.zoo.towers import siglip

HEAD = 32
WINDOW = 12  # less than an image, so that it cuts one


def paligemma(text: dict[str, Any]) -> Any:
    return transformers.PaliGemmaConfig(
        vision_config=siglip(LLAVA_SIDE),
        text_config=transformers.GemmaConfig(head_dim=HEAD, **text),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        projection_dim=text["hidden_size"],
        tie_word_embeddings=False,
    )


def paligemma2(text: dict[str, Any]) -> Any:
    config = paligemma(text)
    config.text_config = transformers.Gemma2Config(
        **{**_windowed(), **text}, attn_logit_softcapping=5.0, final_logit_softcapping=None
    )
    return config


def gemma3(text: dict[str, Any]) -> Any:
    return transformers.Gemma3Config(
        vision_config=siglip(LLAVA_SIDE),
        text_config={**_windowed(), **text},
        mm_tokens_per_image=LLAVA_SIDE**2 // 4,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )


def _windowed() -> dict[str, Any]:
    return {
        "head_dim": HEAD,
        "query_pre_attn_scalar": HEAD,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }


def _pixels(generator: torch.Generator) -> dict[str, Tensor]:
    side = LLAVA_SIDE * PATCH
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def encode_paligemma(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    return [IMAGE] * LLAVA_SIDE**2, _pixels(generator)


def encode_gemma3(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    ids = [VISION_START, *[IMAGE] * (LLAVA_SIDE**2 // 4), VISION_END]
    return ids, _pixels(generator)


def all_prompt(input_ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": torch.zeros_like(input_ids)}


def images_marked(input_ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (input_ids == IMAGE).long()}


# Gemma multiplies its embeddings by the root of the hidden size; its output is not tied to them
# here, for a token would predict itself.
EMBED_STD = 128**-0.5
PALIGEMMA, PALIGEMMA2 = (
    Tiny(
        "PaliGemmaForConditionalGeneration",
        config,
        encode_paligemma,
        embed_std=EMBED_STD,
        per_row=all_prompt,
    )
    for config in (paligemma, paligemma2)
)
GEMMA3 = Tiny(
    "Gemma3ForConditionalGeneration",
    gemma3,
    encode_gemma3,
    embed_std=EMBED_STD,
    per_row=images_marked,
)
