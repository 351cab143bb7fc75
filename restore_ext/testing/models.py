"""Tiny random models of the hooked families, and inputs for them, from transformers' classes.

The weights are drawn large enough that attention has opinions: with the usual small ones every row
attends evenly, and a wrong mask, position or size would hardly show in the logits.
"""

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from restore_ext.testing.zoo import (
    EOS,
    IMAGE,
    LLAVA_SIDE,
    MROPE_SECTION,
    PAD,
    PATCH,
    TEXT,
    VERSION,
    VIDEO,
    VISION_END,
    Picture,
    Tiny,
    Video,
)
from restore_ext.testing.zoo.aya_vision import AYA_VISION
from restore_ext.testing.zoo.gemma import GEMMA3, PALIGEMMA, PALIGEMMA2
from restore_ext.testing.zoo.idefics3 import IDEFICS3, SMOLVLM
from restore_ext.testing.zoo.internvl import INTERNVL
from restore_ext.testing.zoo.llava import LLAVA
from restore_ext.testing.zoo.llava_next import (
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    LLAVA_ONEVISION_SEVERAL,
)
from restore_ext.testing.zoo.mistral3 import MISTRAL3, PIXTRAL
from restore_ext.testing.zoo.qwen import GLM4V, QWEN2_5_VL, QWEN2_VL, QWEN3_VL

__all__ = [
    "ADJACENT_IMAGES",
    "FAMILIES",
    "IMAGE",
    "LLAVA_SIDE",
    "MROPE_SECTION",
    "ONE_IMAGE",
    "PATCH",
    "RAGGED",
    "TEXT",
    "TEXT_ONLY",
    "TINY",
    "TWO_IMAGES",
    "VERSION",
    "VIDEO",
    "Picture",
    "Row",
    "Video",
    "image_tokens",
    "join_rows",
    "make_inputs",
    "single_row",
    "tiny_model",
]

FAMILIES = ("llava", "qwen2_5_vl")  # one of RoPE, one of M-RoPE: tested in every corner
TINY: dict[str, Tiny] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "llava_onevision_several": LLAVA_ONEVISION_SEVERAL,
    "internvl": INTERNVL,
    "mistral3": MISTRAL3,
    "pixtral": PIXTRAL,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "aya_vision": AYA_VISION,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "glm4v": GLM4V,
    "paligemma": PALIGEMMA,
    "paligemma2": PALIGEMMA2,
    "gemma3": GEMMA3,
}

# A row is text (a number of tokens), pictures and videos, in the order of the sequence.
Row = tuple[int | Picture | Video, ...]
ONE_IMAGE: list[Row] = [(5, Picture(8, 12), 7)]
TWO_IMAGES: list[Row] = [(5, Picture(8, 12), 3, Picture(12, 8), 4)]
ADJACENT_IMAGES: list[Row] = [(4, Picture(8, 8), Picture(6, 8), 6)]
RAGGED: list[Row] = [(5, Picture(8, 12), 3, Picture(8, 8), 7), (9, Picture(6, 10), 4)]
TEXT_ONLY: list[Row] = [(23,)]

PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def tiny_model(family: str, *, attn: str = "sdpa", seed: int = 0, **text: Any) -> Any:
    """A random 4-layer model of `family` (a name in TINY) in eval mode, float32.

    attn  the attention implementation it is built with; text  overrides of the text config
    """
    tiny = TINY[family]
    config = tiny.config({**TEXT, **text})
    config._attn_implementation = attn
    model = getattr(transformers, tiny.model_class)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:
                parameter.copy_(tiny.embed_std * noise)
            elif "embed" in name or "newline" in name:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * (1.5 / math.sqrt(parameter[0].numel())))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)
    model.generation_config.eos_token_id = None  # every answer has the length that was asked for
    model.generation_config.pad_token_id = PAD
    return model.eval()


def make_inputs(family: str, rows: list[Row] = ONE_IMAGE, *, seed: int = 0) -> dict[str, Tensor]:
    """What a processor of `family` would return for `rows`: random text and images, left padded."""
    generator = torch.Generator().manual_seed(seed)
    return join_rows([_make_row(TINY[family], row, generator) for row in rows])


def _make_row(tiny: Tiny, row: Row, generator: torch.Generator) -> dict[str, Tensor]:
    ids: list[int] = []
    media: dict[str, list[Tensor]] = {}
    for part in row:
        if isinstance(part, int):
            ids += torch.randint(EOS + 1, VISION_END, (part,), generator=generator).tolist()
            continue
        placeholders, tensors = tiny.encode(part, generator)
        ids += placeholders
        for name, tensor in tensors.items():
            media.setdefault(name, []).append(tensor)
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs |= {name: _padded_cat(parts, tiny.image_dim) for name, parts in media.items()}
    return inputs | tiny.per_row(input_ids)


def join_rows(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of single rows as one batch: text left padded, images padded to the largest."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    inputs = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if name in PER_TOKEN:
            parts = [pad(part, (longest - part.shape[1], 0), value=PAD) for part in parts]
        inputs[name] = _padded_cat(parts, 0)
    return inputs


def _padded_cat(parts: list[Tensor], dim: int) -> Tensor:
    """Joined along one dimension, with zeros behind in the others."""
    largest = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    filled = []
    for part in parts:
        missing = [n - m for n, m in zip(largest, part.shape, strict=True)]
        missing[dim] = 0
        filled.append(pad(part, [x for n in reversed(missing) for x in (0, n)]))
    return torch.cat(filled, dim)


def image_tokens(inputs: dict[str, Tensor]) -> list[int]:
    """The token count of each image of LLaVA or Qwen, in the order of the images."""
    if "image_grid_thw" in inputs:
        return (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    return [LLAVA_SIDE**2] * len(inputs.get("pixel_values", ()))


def single_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch of LLaVA or Qwen on its own: without padding, with only its images."""
    columns = inputs["attention_mask"][row].bool()
    single = {name: inputs[name][row : row + 1, columns] for name in PER_TOKEN if name in inputs}
    counts = image_tokens(inputs)
    in_rows = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    first = _images_in(counts, sum(in_rows[:row]))
    past = _images_in(counts, sum(in_rows[: row + 1]))
    if past == first:
        return single
    if "image_grid_thw" in inputs:
        single["image_grid_thw"] = inputs["image_grid_thw"][first:past]
        patches = [4 * count for count in counts]
        single["pixel_values"] = inputs["pixel_values"][sum(patches[:first]) : sum(patches[:past])]
    else:
        single["pixel_values"] = inputs["pixel_values"][first:past]
    return single


def _images_in(counts: list[int], tokens: int) -> int:
    """How many of the first images make up that many tokens."""
    images = 0
    while sum(counts[:images]) < tokens:
        images += 1
    return images
