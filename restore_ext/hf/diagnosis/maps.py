"""Pictures of a diagnosis: what became of each image's tokens, and where attention falls on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from restore_ext.hf.diagnosis.probe import MAPPED
from restore_ext.hf.diagnosis.result import Diagnosis, Run
from restore_ext.picture import Grid, Heat, Panel, explain
from restore_ext.reduction import Reduction

TITLES = {
    "full": "all tokens",
    "reindexed": "plain, re-indexed",
    "original": "plain, original positions",
    "restore": "RESTORE",
}


@dataclass(frozen=True)
class Base:
    """What an image, or a tile, is drawn on."""

    grid: Grid | None  # rows and columns of its tokens; None: they are no one grid
    pixels: Tensor | None = None  # [3, H, W] as the model sees it, where it is given whole
    reason: str = ""  # why there is no grid


def find_bases(model: Any, inputs: Mapping[str, Any], tokens: Sequence[int]) -> list[Base]:
    """What each image of a processor's inputs, of so many tokens each, can be drawn on."""
    if inputs.get("pixel_values_videos") is not None:
        return [Base(None, reason="frames of videos are not drawn")] * len(tokens)
    grids = inputs.get("image_grid_thw")
    if grids is not None:
        side = model.config.vision_config.spatial_merge_size
        return [Base((int(h) // side, int(w) // side)) for _, h, w in grids.tolist()]
    pixels = _pictures(inputs)
    if len(pixels) != len(tokens):
        reason = (
            f"its tokens are of several tiles in one list ({len(pixels)} tiles, {len(tokens)} "
            "images)"
        )
        return [Base(None, reason=reason)] * len(tokens)
    return [_base(picture, n) for picture, n in zip(pixels, tokens, strict=True)]


def _pictures(inputs: Mapping[str, Any]) -> list[Tensor]:
    """[3, H, W] of each picture or tile that there is, without padding."""
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:  # tiles of each row; those that are zero all over are none
        pixels = pixels.flatten(0, 1)
        pixels = pixels[(pixels != 0).flatten(1).any(1)]
    if pixels.dim() != 4:
        return []
    sizes = inputs.get("image_sizes")
    if sizes is None or len(sizes) != len(pixels):
        return list(pixels)
    pairs = zip(pixels, sizes.tolist(), strict=True)
    return [picture[:, : int(h), : int(w)] for picture, (h, w) in pairs]


def _base(picture: Tensor, tokens: int) -> Base:
    _, height, width = picture.shape
    side = sqrt(height * width / tokens)
    grid = round(height / side), round(width / side)
    if grid[0] * grid[1] == tokens:
        return Base(grid, picture)
    return Base(None, reason=f"its {tokens} tokens are no grid over {height} x {width} pixels")


def as_picture(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Normalised pixels [3, H, W] as a picture; mean and std as the processor has them."""
    shift, scale = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
    bright = pixels.float().cpu() * scale + shift
    return Image.fromarray((bright.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())


def draw_tokens(
    diagnosis: Diagnosis, number: int, picture: Image.Image, grid: Grid, heading: str
) -> Image.Image:
    """A sheet of what became of an image's tokens: all, by the plain method, with RESTORE."""
    panels = [Panel(TITLES["full"], f"{grid[0]} x {grid[1]} visual tokens")]
    for name, title in (("original", "plain"), ("restore", TITLES["restore"])):
        if name in diagnosis.ways:
            reduction = diagnosis.ways[name].reductions[number]
            panels.append(Panel(title, _said_of(reduction), reduction))
    return explain(picture, heading, panels, grid=grid)


def draw_attention(
    diagnosis: Diagnosis, number: int, picture: Image.Image, grid: Grid, heading: str
) -> Image.Image:
    """A sheet of what the text (above) and the last token (below) look at, in the full run and in
    each reduced one: means over layers. What a merged token gets is shared by its members. A row
    has one scale, and the full run's most looked at token is brightest."""
    runs: dict[str, Run] = {"full": diagnosis.full, **diagnosis.ways}
    panels = []
    for queries in MAPPED:
        values = {name: run.attention[queries][number].mean(0) for name, run in runs.items()}
        most = float(values["full"].max())
        for name, value in values.items():
            who = {"text": "the text", "last": "the last token"}[queries]
            note = f"{who} spends {float(value.sum()):.3f} of its attention here"
            if name == "full":  # which is the scale of the row
                note = f"{who} spends {float(value.sum()):.3f} here, {most:.4f} where brightest"
            panels.append(Panel(TITLES[name], note, heat=Heat(value.tolist(), most)))
    return explain(picture, heading, panels, grid=grid, columns=len(runs))


def _said_of(reduction: Reduction) -> str:
    kept, merged = int(reduction.kept.sum()), int(reduction.merged.sum())
    said = f"{kept} kept"
    if merged:
        said += f"; {merged} merged: a colour each, a dot where it stands"
    if len(reduction.group[0]) == kept:
        return f"all {kept} kept"
    return said if merged else f"{said}, the rest dropped"
