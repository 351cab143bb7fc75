"""Tiny random models of the hooked families, and inputs for them, from transformers' classes.

The weights are drawn large enough that attention has opinions: with the usual small ones every row
attends evenly, and a wrong mask, position or size would hardly show in the logits.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
FAMILIES = ("llava", "qwen2_5_vl")

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
    """One image of a row, in patches. LLaVA's are always 8 x 8 (64 tokens); Qwen merges 2 x 2."""

    height: int = LLAVA_SIDE
    width: int = LLAVA_SIDE


# A row is text (a number of tokens) and pictures, in the order of the sequence.
Row = tuple[int | Picture, ...]
ONE_IMAGE: list[Row] = [(5, Picture(8, 12), 7)]
TWO_IMAGES: list[Row] = [(5, Picture(8, 12), 3, Picture(12, 8), 4)]
ADJACENT_IMAGES: list[Row] = [(4, Picture(8, 8), Picture(6, 8), 6)]
RAGGED: list[Row] = [(5, Picture(8, 12), 3, Picture(8, 8), 7), (9, Picture(6, 10), 4)]
TEXT_ONLY: list[Row] = [(23,)]


def tiny_model(family: str, *, attn: str = "sdpa", seed: int = 0, **text: Any) -> Any:
    """A random 4-layer model of `family` ("llava" or "qwen2_5_vl") in eval mode, float32.

    attn  the attention implementation it is built with; text  overrides of the text config
    """
    config = _CONFIGS[family]({**TEXT, **text})
    config._attn_implementation = attn
    model = getattr(transformers, _CLASSES[family])(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name:
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
    ids: list[list[int]] = []
    pixels, grids = [], []
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, int):
                drawn = torch.randint(EOS + 1, VISION_END, (part,), generator=generator)
                ids[-1] += drawn.tolist()
            elif family == "llava":
                ids[-1] += [IMAGE] * LLAVA_SIDE**2
                side = LLAVA_SIDE * PATCH
                pixels.append(torch.randn(1, 3, side, side, generator=generator))
            else:
                patches = part.height * part.width
                ids[-1] += [VISION_START, *[IMAGE] * (patches // 4), VISION_END]
                pixels.append(torch.randn(patches, 3 * 2 * PATCH**2, generator=generator))
                grids.append([1, part.height, part.width])
    longest = max(map(len, ids))
    input_ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    if grids:
        inputs["image_grid_thw"] = torch.tensor(grids)
    if family == "qwen2_5_vl" and VERSION >= (5, 0):
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).long()
    return inputs


def image_tokens(inputs: dict[str, Tensor]) -> list[int]:
    """The token count of each image, in the order of the images."""
    if "image_grid_thw" in inputs:
        return (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    return [LLAVA_SIDE**2] * len(inputs.get("pixel_values", ()))


def single_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch on its own: without padding, with only its images."""
    columns = inputs["attention_mask"][row].bool()
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    single = {name: inputs[name][row : row + 1, columns] for name in per_token if name in inputs}
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


def _llava_config(text: dict[str, Any]) -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=LLAVA_SIDE * PATCH,
            patch_size=PATCH,
            projection_dim=32,
        ),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=LLAVA_SIDE**2,
    )


def _qwen2_5_vl_config(text: dict[str, Any]) -> Any:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": MROPE_SECTION}
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": text["hidden_size"],
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        },
        text_config={**text, "rope_theta": 10000.0, "rope_scaling": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


_CONFIGS = {"llava": _llava_config, "qwen2_5_vl": _qwen2_5_vl_config}
_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
