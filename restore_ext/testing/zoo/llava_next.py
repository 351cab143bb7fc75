"""A tiny LLaVA-NeXT and LLaVA-OneVision: an overview and tiles of 4 x 4 tokens, and newlines."""

from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, PATCH, VIDEO, Picture, Tiny, Video
from restore_ext.testing.zoo.towers import clip, siglip

TILE = 4  # patches, and tokens, to a side
GRIDS = ((1, 2), (2, 1), (2, 2))  # of tiles: the best fit is taken
PINPOINTS = [[TILE * PATCH * y, TILE * PATCH * x] for y, x in GRIDS]
MAX_TILES = 2  # LLaVA-OneVision's: 2 x 2 tiles are scaled down to what so many would have


def next_config(text: dict[str, Any]) -> Any:
    return transformers.LlavaNextConfig(
        vision_config=clip(TILE),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )


def onevision_config(text: dict[str, Any]) -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=siglip(TILE),
        text_config=transformers.Qwen2Config(**text),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
    )


def grid_of(picture: Picture) -> tuple[int, int]:
    """The grid of tiles on which the most of a picture is seen, then with the least left over."""

    def fit(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = TILE * grid[0], TILE * grid[1]
        scale = min(height / picture.height, width / picture.width)
        shown = int(picture.height * scale * PATCH) * int(picture.width * scale * PATCH)
        shown = min(shown, picture.height * picture.width * PATCH**2)
        return shown, shown - height * width * PATCH**2

    return max(GRIDS, key=fit)


def packed_shape(picture: Picture) -> tuple[int, int]:
    """Rows and columns of a picture's tokens on its tiles, without the padding."""
    height, width = (TILE * n for n in grid_of(picture))
    if picture.width / picture.height > width / height:
        seen = int(round(picture.height * width / picture.width, 7))
        return height - 2 * ((height - seen) // 2), width
    seen = int(round(picture.width * height / picture.height, 7))
    return height, width - 2 * ((width - seen) // 2)


def tiled(picture: Picture, generator: torch.Generator) -> dict[str, Tensor]:
    y, x = grid_of(picture)
    side = TILE * PATCH
    return {
        "pixel_values": torch.randn(1, 1 + y * x, 3, side, side, generator=generator),
        "image_sizes": torch.tensor([[picture.height * PATCH, picture.width * PATCH]]),
    }


def next_encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    assert isinstance(picture, Picture)
    rows, columns = packed_shape(picture)
    return [IMAGE] * (TILE**2 + rows * (columns + 1)), tiled(picture, generator)


def onevision_encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    if isinstance(picture, Video):
        side = TILE * PATCH
        pixels = torch.randn(1, picture.frames, 3, side, side, generator=generator)
        tokens = picture.frames * (TILE // 2) ** 2 + 1
        return [VIDEO] * tokens, {"pixel_values_videos": pixels}
    rows, columns = packed_shape(picture)
    ratio = (rows * columns / (MAX_TILES * TILE**2)) ** 0.5
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return [IMAGE] * (TILE**2 + rows * (columns + 1)), tiled(picture, generator)


def several_encode(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    """One of several images of a row: the overview alone, and one newline."""
    assert isinstance(picture, Picture)
    tensors = tiled(picture, generator)
    tensors["pixel_values"] = tensors["pixel_values"][:, :1]
    return [IMAGE] * (TILE**2 + 1), tensors


def several_per_token(input_ids: Tensor) -> dict[str, Tensor]:
    return {"batch_num_images": (input_ids == IMAGE).sum(1) // (TILE**2 + 1)}


LLAVA_NEXT = Tiny("LlavaNextForConditionalGeneration", next_config, next_encode)
LLAVA_ONEVISION = Tiny(
    "LlavaOnevisionForConditionalGeneration", onevision_config, onevision_encode, videos=True
)
LLAVA_ONEVISION_SEVERAL = Tiny(
    "LlavaOnevisionForConditionalGeneration",
    onevision_config,
    several_encode,
    per_row=several_per_token,
)
