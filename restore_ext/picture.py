"""Pictures of a reduction: which patches were kept, and which were merged with which. PIL only."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from restore_ext.reduction import Reduction

SIDE = 480  # pixels a panel's picture is wide and high
MARGIN = 24
INK, DARK, PAPER, SOFT = (28, 30, 36), (12, 13, 16), (252, 252, 250), (110, 114, 124)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Panel:
    """One picture of the row: its title, the line under it, and the reduction to show, if any."""

    title: str
    note: str
    reduction: Reduction | None = None  # of one image (B = 1) whose tokens are a square grid


def explain(image: Image.Image, heading: str, panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side under a heading; every panel shows `image` with its reduction."""
    width = MARGIN + len(panels) * (SIDE + MARGIN)
    top, under = 76, 64
    sheet = Image.new("RGB", (width, top + SIDE + under + 12), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 22), heading, fill=INK, font=ImageFont.load_default(30))
    for i, panel in enumerate(panels):
        left = MARGIN + i * (SIDE + MARGIN)
        picture = image if panel.reduction is None else show(image, panel.reduction)
        sheet.paste(_fit(picture), (left, top))
        pen.text((left, top + SIDE + 8), panel.title, fill=INK, font=ImageFont.load_default(22))
        pen.text((left, top + SIDE + 37), panel.note, fill=SOFT, font=ImageFont.load_default(18))
    return sheet


def show(image: Image.Image, reduction: Reduction) -> Image.Image:
    """The image, SIDE x SIDE: kept patches clear and framed, merged groups tinted, the rest dark.

    A group has one colour, borders where it meets others, and a dot on the patch at whose position
    its token stands. Raises ValueError if the tokens are not one image's square grid.
    """
    B, N = reduction.group.shape
    side = math.isqrt(N)
    if B != 1 or side * side != N:
        raise ValueError(f"reduction must be one image's square grid of tokens, got {[B, N]}")
    group = reduction.group[0].tolist()
    merged = set(reduction.merged[0].nonzero().flatten().tolist())
    edges = [round(i * SIDE / side) for i in range(side + 1)]
    boxes = [
        (edges[n % side], edges[n // side], edges[n % side + 1], edges[n // side + 1])
        for n in range(N)
    ]
    canvas = _fit(image)
    grey = canvas.convert("L").convert("RGB")  # under a tint the picture keeps its light alone
    for (x0, y0, x1, y1), g in zip(boxes, group, strict=True):
        if g < 0 or g in merged:
            colour, share = (_colour(g), 0.55) if g in merged else (DARK, 0.85)
            tint = Image.new("RGB", (x1 - x0, y1 - y0), colour)
            canvas.paste(Image.blend(grey.crop((x0, y0, x1, y1)), tint, share), (x0, y0))
    pen = ImageDraw.Draw(canvas)
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        if group[n] not in merged:
            continue
        if (n + 1) % side and group[n + 1] != group[n]:
            pen.line((x1, y0, x1, y1), fill=INK)
        if n + side < N and group[n + side] != group[n]:
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


def _fit(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _colour(group: int) -> Colour:
    """A colour far from those of the groups before: hues a golden ratio apart."""
    hue = group * 0.618034 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75 if group % 2 else 0.55, 0.98)
    return round(255 * red), round(255 * green), round(255 * blue)
