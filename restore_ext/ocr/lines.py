"""Rendered lines of text: English words and numbers in three faces of DejaVu."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 48, 640  # pixels that the reader was trained on
MARGIN = 8
FACES = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
LONGEST = 32  # characters
PLAIN = """able about account answer apple autumn balance basket before beneath bicycle bridge
bright building butter candle captain castle century chapter circle coffee copper corner country
cotton customer dancer delivery desk distance doctor dozen early east engine evening famous farmer
fever field figure flower forest forward garden gentle glass golden grammar guest hammer harbour
height history honest hundred invoice island jacket journey judge kitchen knife ladder language
letter library lion machine market meadow member message middle minute mirror mountain museum needle
north notebook number ocean office orange order oxygen paper parcel people picture planet pocket
police quarter question quiet railway receipt remember river school season second shadow signal
silver simple station street student summer table teacher thunder ticket tomorrow total travel
uncle under valley village voyage water weather wednesday whisper window winter yellow young
zebra"""
WORDS = PLAIN.split()


class Line(NamedTuple):
    image: Image.Image  # "L", HEIGHT x WIDTH, grey behind the paper
    text: str


def draw(seed: int) -> Line:
    """Line number `seed`: one to four words and, in two of three, a number; dark on light paper.

    raises  OSError: DejaVu is neither among the system's fonts nor in matplotlib
    """
    rng = np.random.default_rng([20_260_601, seed])
    face = FACES[rng.integers(len(FACES))]
    points, ink, paper = (int(rng.integers(*span)) for span in ((26, 33), (0, 60), (215, 256)))
    font = _font(face, points)
    while True:
        text = _text(rng)
        left, top, right, bottom = font.getbbox(text)
        width = int(right - left) + 2 * MARGIN
        if len(text) <= LONGEST and width <= WIDTH:
            break
    image = Image.new("L", (WIDTH, HEIGHT), 128)
    image.paste(paper, (0, 0, width, HEIGHT))
    at = (MARGIN - left, (HEIGHT - (bottom - top)) / 2 - top)
    ImageDraw.Draw(image).text(at, text, fill=ink, font=font)
    return Line(image, text)


def _text(rng: np.random.Generator) -> str:
    words = [str(word) for word in rng.choice(WORDS, rng.integers(1, 5))]
    words[0] = words[0].capitalize() if rng.random() < 0.5 else words[0]
    if rng.random() < 2 / 3:
        number = str(rng.integers(10, 10 ** rng.integers(2, 7)))
        words.insert(int(rng.integers(len(words) + 1)), number)
    return " ".join(words)


@cache
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(face, points)
    except OSError:
        found = importlib.util.find_spec("matplotlib")
        if found is None or found.origin is None:
            raise OSError(
                f"the font {face} is not on this system, nor is matplotlib, which carries it"
            ) from None
        folder = Path(found.origin).parent / "mpl-data/fonts/ttf"
        return ImageFont.truetype(str(folder / face), points)


def character_errors(read: str, text: str) -> int:
    """The edit distance (Levenshtein): characters to insert, drop or replace to get from one to
    the other."""
    row = list(range(len(text) + 1))
    for i, a in enumerate(read, 1):
        before, row = row, [i]
        for j, b in enumerate(text, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]
