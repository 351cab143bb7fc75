"""How each family's tiny model is built, and what its processor makes of a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# Ids with a meaning; text is drawn from those between.
PAD, BOS, EOS, VISION_END, VISION_START, VIDEO, IMAGE, VOCABULARY = 0, 1, 2, 296, 297, 298, 299, 300
PATCH = 14
LLAVA_SIDE = 8  # patches
MROPE_SECTION = [4, 6, 6]

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Picture:
    """One image of a row, in patches. A family of one image size has that instead."""

    height: int = LLAVA_SIDE
    width: int = LLAVA_SIDE


@dataclass(frozen=True)
class Video:
    """A video of a row, in frames and patches."""

    frames: int = 3
    height: int = LLAVA_SIDE
    width: int = LLAVA_SIDE


def no_more(input_ids: Tensor) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model and inputs.

    model_class  in transformers
    config       the model's config, from the words of its text config
    encode       the placeholders of a picture, as ids in the sequence, and the model's inputs for
                 it, which are concatenated over the pictures of a row along `image_dim`, and over
                 rows along 0
    embed_std    of the token embeddings; below 1 where the model makes them larger
    per_row      further inputs of a row, from its ids [1, S]
    videos       whether `encode` knows videos
    """

    model_class: str
    config: Callable[[dict[str, Any]], Any]
    encode: Callable[[Picture | Video, torch.Generator], tuple[list[int], dict[str, Tensor]]]
    image_dim: int = 0
    embed_std: float = 1.0
    per_row: Callable[[Tensor], dict[str, Tensor]] = no_more
    videos: bool = False
