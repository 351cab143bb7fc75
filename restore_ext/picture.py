"""Pictures of a reduction: patches kept, patches merged, where attention falls. PIL only."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from restore_ext.reduction import Reduction

SIDE = 480  # pixels the longer side of a panel's picture has
MARGIN = 24
INK, DARK, PAPER, SOFT = (28, 30, 36), (12, 13, 16), (252, 252, 250), (110, 114, 124)
# From no attention to the most of it, evenly apart.
RAMP = ((8, 8, 24), (88, 20, 110), (188, 55, 84), (245, 125, 20), (252, 250, 180))
Colour = tuple[int, int, int]
Grid = tuple[int, int]  # rows and columns of an image's tokens
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Heat:
    """What each token of an image gets, in raster order, and what is drawn brightest."""

    values: Sequence[float]
    most: float


@dataclass(frozen=True)
class Panel:
    """One picture of the sheet: its title, the line under it, and what is shown of the tokens."""

    title: str
    note: str
    reduction: Reduction | None = None  # of one image (B = 1)
    heat: Heat | None = None


def explain(
    image: Image.Image,
    heading: str,
    panels: Sequence[Panel],
    *,
    grid: Grid | None = None,
    columns: int | None = None,
) -> Image.Image:
    """The panels under a heading, `columns` to a row (all in one by default); every panel shows
    `image` with its reduction or its heat. grid: of the image's tokens; square by default."""
    columns = len(panels) if columns is None else min(columns, len(panels))
    pictures = [_of_panel(image, panel, grid) for panel in panels]
    top, under = 76, 64
    height = max(picture.height for picture in pictures) + under
    rows = -(-len(panels) // columns)
    size = (MARGIN + columns * (SIDE + MARGIN), top + rows * (height + 12))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 22), heading, fill=INK, font=ImageFont.load_default(30))
    for i, (panel, picture) in enumerate(zip(panels, pictures, strict=True)):
        left = MARGIN + i % columns * (SIDE + MARGIN)
        upper = top + i // columns * (height + 12)
        lower = upper + height - under
        sheet.paste(picture, (left, upper))
        pen.text((left, lower + 8), panel.title, fill=INK, font=ImageFont.load_default(22))
        pen.text((left, lower + 37), panel.note, fill=SOFT, font=ImageFont.load_default(18))
    return sheet


def _of_panel(image: Image.Image, panel: Panel, grid: Grid | None) -> Image.Image:
    if panel.reduction is not None:
        return show(image, panel.reduction, grid)
    if panel.heat is not None:
        return warm(image, panel.heat, grid)
    return _fit(image, grid or (1, 1))


def show(image: Image.Image, reduction: Reduction, grid: Grid | None = None) -> Image.Image:
    """The image: kept patches clear and framed, merged groups tinted, the rest dark.

    A group has one colour, borders where it meets others, and a dot on the patch at whose position
    its token stands. grid is square by default. Raises ValueError if the tokens are not one image's
    grid.
    """
    B, N = reduction.group.shape
    if B != 1:
        raise ValueError(f"reduction must be of one image, got {[B, N]}")
    rows, columns = _require_grid("reduction", N, grid)
    group = reduction.group[0].tolist()
    merged = set(reduction.merged[0].nonzero().flatten().tolist())
    canvas = _fit(image, (rows, columns))
    boxes = _boxes(canvas, rows, columns)
    grey = canvas.convert("L").convert("RGB")  # under a tint the picture keeps its light alone
    for box, g in zip(boxes, group, strict=True):
        if g < 0 or g in merged:
            _tint(canvas, grey, box, *((_colour(g), 0.55) if g in merged else (DARK, 0.85)))
    pen = ImageDraw.Draw(canvas)
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        if group[n] not in merged:
            continue
        if (n + 1) % columns and group[n + 1] != group[n]:
            pen.line((x1, y0, x1, y1), fill=INK)
        if n + columns < N and group[n + columns] != group[n]:
            pen.line((x0, y1, x1, y1), fill=INK)
    for m, n in enumerate(reduction.position[0].tolist()):
        if n < 0:
            continue
        x0, y0, x1, y1 = boxes[n]
        if m in merged:
            x, y, r = (x0 + x1) / 2, (y0 + y1) / 2, max(3, (x1 - x0) * 0.26)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=_colour(m), outline=PAPER, width=2)
        else:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=PAPER, width=2)
    return canvas


def warm(image: Image.Image, heat: Heat, grid: Grid | None = None) -> Image.Image:
    """The image in grey under a colour for each patch: dark is no attention, bright `most` of it or
    more, evenly by the square root, for attention is on few. Raises ValueError as show()."""
    rows, columns = _require_grid("heat", len(heat.values), grid)
    canvas = _fit(image, (rows, columns))
    grey = canvas.convert("L").convert("RGB")
    for box, value in zip(_boxes(canvas, rows, columns), heat.values, strict=True):
        share = math.sqrt(min(max(value / heat.most, 0), 1)) if heat.most > 0 else 0
        _tint(canvas, grey, box, _ramp(share), 0.75)
    return canvas


def _require_grid(name: str, N: int, grid: Grid | None) -> Grid:
    rows, columns = (math.isqrt(N), math.isqrt(N)) if grid is None else grid
    if rows * columns != N or not N:
        wanted = "a square grid" if grid is None else f"a grid of {rows} x {columns}"
        raise ValueError(f"{name} must be of {wanted} of tokens, got [1, {N}]")
    return rows, columns


def _boxes(canvas: Image.Image, rows: int, columns: int) -> list[Box]:
    """Where each patch is, in pixels: left, upper, right, lower."""
    xs = [round(i * canvas.width / columns) for i in range(columns + 1)]
    ys = [round(i * canvas.height / rows) for i in range(rows + 1)]
    return [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]


def _tint(canvas: Image.Image, grey: Image.Image, box: Box, colour: Colour, share: float) -> None:
    tint = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), colour)
    canvas.paste(Image.blend(grey.crop(box), tint, share), box[:2])


def _fit(image: Image.Image, grid: Grid) -> Image.Image:
    """The image as large as a panel takes it, in the proportions of its tokens' grid."""
    longest = max(grid)
    width, height = (max(round(SIDE * side / longest), 1) for side in (grid[1], grid[0]))
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _ramp(share: float) -> Colour:
    """The colour at a share in 0..1 of the ramp."""
    step = min(int(share * (len(RAMP) - 1)), len(RAMP) - 2)
    part = share * (len(RAMP) - 1) - step
    low, high = RAMP[step], RAMP[step + 1]
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _colour(group: int) -> Colour:
    """A colour far from those of the groups before: hues a golden ratio apart."""
    hue = group * 0.618034 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75 if group % 2 else 0.55, 0.98)
    return round(255 * red), round(255 * green), round(255 * blue)
