"""A tiny Mistral 3 and Pixtral: pictures of any even size, 2 x 2 patches to a token or one, breaks
between the rows."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, PATCH, VISION_END, VISION_START, Picture, Tiny, Video
from restore_ext.testing.zoo.towers import VIT

BREAK = VISION_START


def config(text: dict[str, Any]) -> Any:
    head_size = text["hidden_size"] // text["num_attention_heads"]
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**VIT, image_size=16 * PATCH),
        text_config=transformers.MistralConfig(
            **{"head_dim": head_size, "sliding_window": None, **text}
        ),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    height, width = picture.height * PATCH, picture.width * PATCH
    ids = [*[IMAGE] * (picture.width // 2), BREAK] * (picture.height // 2)
    return [*ids[:-1], VISION_END], {
        "pixel_values": torch.randn(1, 3, height, width, generator=generator),
        "image_sizes": torch.tensor([[height, width]]),
    }


def pixtral_config(text: dict[str, Any]) -> Any:
    stock = config(text)
    return transformers.LlavaConfig(
        vision_config=stock.vision_config,
        text_config=stock.text_config,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def pixtral_encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    _, tensors = encode(picture, generator)
    return [*[*[IMAGE] * picture.width, BREAK] * picture.height][:-1], tensors


MISTRAL3 = Tiny("Mistral3ForConditionalGeneration", config, encode)
PIXTRAL = Tiny("LlavaForConditionalGeneration", pixtral_config, pixtral_encode)
