"""What the tests of the families share: models built once, and what they should say."""

import math
from functools import cache

import torch
from dense import Dense
from hf_harness import answers, assert_close, forward, generate, logits
from naive import Setting

import restore_ext
from restore_ext.hf.families import find_family
from restore_ext.testing.models import RAGGED, Picture, Video, join_rows, make_inputs, tiny_model
from restore_ext.testing.zoo.llava_next import TILE, packed_shape

MROPE = ("qwen2_vl", "qwen3_vl", "glm4v")
MASKS = ("paligemma", "paligemma2", "gemma3", "aya_vision")
TOLERANCE = 1e-4  # of the largest logit: the layers of some are worth ten roundings of others

# Families with videos of their own, and one whose frames come as images.
VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
WITH_FRAMES = (*VIDEOS, "internvl")

# Rows for every family: several images, ragged, text longer than a window before and behind.
ROWS = [*RAGGED, (3, Picture(8, 8), 15)]


def mixed_rows(family: str) -> list:
    """Images and videos in one row, in either order and side by side, and videos alone."""
    if family == "glm4v":  # which has one placeholder for both
        return [
            (5, Video(2, 4, 6), 7),
            (2, Video(3, 6, 4), Video(1, 6, 8), 4),
            (4, Video(2, 4, 4), 6),
        ]
    frames = 2 if family == "llava_onevision" else 3  # its videos are of one length
    return [
        (5, Picture(8, 12), 3, Video(2, 4, 6), 7),
        (2, Video(frames, 6, 4), 2, Picture(6, 8), Picture(4, 8), 4),
        (4, Video(2, 4, 4), Video(frames, 4, 6), Picture(4, 8), 6),
        (9, Video(2, 6, 4), 3),
    ]


def images_of(family: str, row: tuple) -> list[tuple[int, bool]]:
    """Of each image of a row, each frame of a video, the tokens but separators; and whether it is
    a frame."""
    images: list[tuple[int, bool]] = []
    for part in row:
        if isinstance(part, int):
            continue
        tokens = part.height * part.width // 4
        if family == "internvl":
            tokens = 16
        if family == "llava_onevision":
            packed = scaled_shape(family, part) if isinstance(part, Picture) else ()
            tokens = TILE**2 + math.prod(packed) if packed else TILE**2 // 4
        images += [(tokens, isinstance(part, Video))] * getattr(part, "frames", 1)
    return images


def scaled_shape(family: str, picture: Picture) -> tuple[int, int]:
    rows, columns = packed_shape(picture)
    ratio = math.sqrt(rows * columns / (2 * TILE**2))
    if family == "llava_onevision" and ratio > 1.1:
        return int(rows // ratio), int(columns // ratio)
    return rows, columns


@cache
def model(family: str):
    """The model that tests attach to, one after the other; nothing is attached between them."""
    softcap = family == "paligemma2"  # which sdpa does not know
    return tiny_model(family, attn="eager" if softcap else "sdpa")


@cache
def dense(family: str) -> Dense:
    return Dense(model(family), find_family(model(family)).lm_name)


def row_inputs(family: str, rows: list) -> list[dict]:
    """The inputs of each row on its own."""
    return [make_inputs(family, [row], seed=i) for i, row in enumerate(rows)]


def assert_generates_dense(
    family: str, handle, rows: list = ROWS, copies: int = 1, **setting
) -> dict:
    """generate() on the rows as a batch has the logits of the reference, row by row.

    copies  how many answers of each row there are: `num_return_sequences`

    returns  the batch
    """
    alone = row_inputs(family, rows)
    inputs = join_rows(alone)
    options = {"num_return_sequences": copies, "do_sample": True, "top_k": 20} if copies > 1 else {}
    out = generate(model(family), inputs, **options)
    assert handle.last.plan.valid.shape[1] < inputs["input_ids"].shape[1]
    tokens = answers(out, inputs)
    for row in range(len(rows) * copies):
        full = dense(family).prompt(alone[row // copies])
        want = dense(family).logits(
            full, handle.last.plan, row, tokens[row].tolist(), Setting(**setting)
        )
        assert_close(logits(out)[row], want, TOLERANCE)
    return inputs


@torch.no_grad()
def assert_same_bits(family: str, inputs: dict, want: list[torch.Tensor]) -> None:
    """The model says the very bits of before, in a forward and in generate()."""
    for got, before in zip(said(family, inputs), want, strict=True):
        assert torch.equal(got, before)


@torch.no_grad()
def said(family: str, inputs: dict) -> list[torch.Tensor]:
    return [model(family)(**inputs).logits, logits(generate(model(family), inputs))]


def row_totals(family: str, inputs: dict) -> dict[int, int]:
    """The visual tokens of each row, counted by the model itself."""
    with restore_ext.attach(model(family), method="uniform", keep=1) as handle:
        forward(model(family), inputs)
        totals: dict[int, int] = {}
        for image in handle.last.images:
            totals[image.row] = totals.get(image.row, 0) + image.tokens_before
    return totals
