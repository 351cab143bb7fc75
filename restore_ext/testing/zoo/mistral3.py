"""A tiny Mistral 3: pictures of any even size, 2 x 2 patches to a token, rows that end in a break."""

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
    ids = [IMAGE, *[IMAGE] * (picture.width // 2 - 1), BREAK] * (picture.height // 2)
    return [*ids[:-1], VISION_END], {
        "pixel_values": torch.randn(1, 3, height, width, generator=generator),
        "image_sizes": torch.tensor([[height, width]]),
    }


MISTRAL3 = Tiny("Mistral3ForConditionalGeneration", config, encode)
