"""Lower input resolution: what fewer tokens cost when the picture itself is made smaller."""

import torch
from torch import Tensor

from restore_ext.methods.problem import PICTURE, Method


def smaller_grid(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """The largest grid of no more than `budget` tokens that keeps the shape of rows x columns.

    It has h rows, h as large as can be, and max(1, floor(h * columns / rows)) columns (or the other
    way round where the picture is wide): of a square, the largest square. Fewer tokens than the
    budget, where that is no square, but a picture that is not squeezed.
    """
    if rows > columns:
        height, width = smaller_grid(columns, rows, budget)
        return width, height
    height = max(h for h in range(1, rows + 1) if h == 1 or h * (h * columns // rows) <= budget)
    return height, min(max(1, height * columns // rows), max(1, budget // height))


def cells(rows: int, columns: int, height: int, width: int, device: torch.device) -> Tensor:
    """The token [rows * columns] int64 of the smaller grid, height x width, in which the middle of
    every token of the larger one lies; raster order, none is left without."""
    row = (2 * torch.arange(rows, device=device) + 1) * height // (2 * rows)
    column = (2 * torch.arange(columns, device=device) + 1) * width // (2 * columns)
    return (row[:, None] * width + column).flatten()


DOWNSAMPLE = Method(place=PICTURE, about="a smaller picture: the honest baseline")
