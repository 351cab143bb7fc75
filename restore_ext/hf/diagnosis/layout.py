"""Which tokens of a batch of prompts are visual, and which text is asked about them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.cut import padding_mask
from restore_ext.hf.families import Family
from restore_ext.hf.images import images_of_rows, without_separators
from restore_ext.hf.settings import Settings
from restore_ext.hf.visuals import encode


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of one image: of a tile where tiles count as images, of a video's frame."""

    row: int  # of the batch
    index: Tensor  # [N] int64, where they are in the row, padding included


@dataclass(frozen=True)
class Layout:
    """B prompts of S tokens, padding included."""

    valid: Tensor  # [B, S] bool, no padding
    is_visual: Tensor  # [B, S] bool; separators are no visual tokens
    behind: Tensor  # [B, S] bool, text behind the last image; the last token where there is none
    images: list[ImageTokens]  # in the order of the batch


@torch.no_grad()
def read_layout(family: Family, settings: Settings, inputs: Mapping[str, Any]) -> Layout:
    """The layout of a processor's inputs, learnt by encoding their images and videos once.

    raises  ValueError: a row without an image, or padded on the right
    """
    input_ids = inputs["input_ids"]
    visuals = encode(family, settings, dict(inputs), input_ids)
    assert visuals is not None  # the caller has looked
    is_image = visuals.at
    valid = padding_mask(inputs.get("attention_mask"), input_ids[..., None])
    if not valid[:, -1].all():
        raise ValueError("attention_mask must be padded on the left, got 0 for a row's last token")
    if not is_image.any(1).all():
        row = int((~is_image.any(1)).nonzero()[0, 0])
        raise ValueError(f"input_ids must have an image in every row, got none in row {row}")
    lengths = [len(image) for image in visuals.features]
    rows = images_of_rows(is_image.sum(1).tolist(), lengths)
    features, is_visual = without_separators(visuals.features, visuals.seen, rows, is_image)
    last = torch.where(is_image, torch.arange(is_image.shape[1], device=is_image.device), 0).amax(1)
    behind = torch.arange(is_image.shape[1], device=is_image.device) > last[:, None]
    behind[:, -1] |= ~behind.any(1)
    return Layout(valid, is_visual, behind, _images(rows, features, is_visual))


def _images(rows: list[list[int]], features: list[Tensor], is_visual: Tensor) -> list[ImageTokens]:
    images = []
    for row, numbers in enumerate(rows):
        columns = is_visual[row].nonzero()[:, 0].cpu()
        counts = [len(features[number]) for number in numbers]
        images += [ImageTokens(row, index) for index in columns.split(counts)]
    return images
