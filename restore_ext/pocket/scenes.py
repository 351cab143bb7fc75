"""The pocket model's world: drawn scenes, questions about them, and the words they are asked in.

A scene is 2 to 5 objects on a 96 x 96 picture, at most one in each cell of a 3 x 3 grid; an answer
is one word. Everything is drawn from a numpy Generator, so a seed is a scene. The shipped weights
depend on the order of the vocabulary and on the drawing: change either and they have to be trained
again (bench/train_pocket.py).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96  # pixels; patches of 4 make 24 x 24 = 576 visual tokens
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLACES = (
    *("topleft", "top", "topright"),
    *("left", "center", "right"),
    *("bottomleft", "bottom", "bottomright"),
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
RELATIONS = ("left_of", "right_of", "above", "below")
KINDS = ("color", "shape", "count", "where", "rel", "exist")

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
FRAME = """user assistant a chat about the picture : ? what color is shape how many objects where
object of to left_of right_of above below there yes no describe ;"""
# A word's id is its place here; "left", "right", "top" and "bottom" are there once.
WORDS = tuple(dict.fromkeys([*SPECIAL, *FRAME.split(), *COLOURS, *SHAPES, *PLACES, *NUMBERS]))
ID = {word: i for i, word in enumerate(WORDS)}

SYSTEM = "<s> a chat about the picture :"  # how every chat begins

# Held-out scenes are seeded by [HELD_OUT, index]; training seeds are single numbers below it, so
# numpy's seed sequences never meet.
HELD_OUT = 10_000_007


class Thing(NamedTuple):
    """A drawn object; `cell` counts the 3 x 3 grid row by row, x and y are its centre in pixels."""

    shape: str
    colour: str
    cell: int
    x: int
    y: int


class Question(NamedTuple):
    text: str
    answer: str
    kind: str  # one of KINDS


class Scene(NamedTuple):
    image: Image.Image  # RGB, SIDE x SIDE
    things: list[Thing]
    question: Question


def held_out(index: int) -> Scene:
    """Scene number `index` of those no training run has seen, with one question."""
    rng = np.random.default_rng([HELD_OUT, index])
    image, things = draw(rng)
    return Scene(image, things, ask(things, rng))


def draw(rng: np.random.Generator) -> tuple[Image.Image, list[Thing]]:
    """One scene on a noisy gradient: the picture and what is on it."""
    ramp = np.linspace(-1, 1, SIDE)
    base = np.ones((SIDE, SIDE, 3)) * rng.integers(0, 90, 3)
    base += ramp[None, :, None] * rng.uniform(-25, 25, 3)
    base += ramp[:, None, None] * rng.uniform(-25, 25, 3)
    noisy = np.clip(base + rng.normal(0, 6, base.shape), 0, 255)
    image = Image.fromarray(noisy.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    things = []
    for cell in rng.permutation(9)[: rng.integers(2, 6)]:
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        r = int(rng.integers(6, 13))
        x, y = (int(c) * 32 + 16 + int(rng.integers(-4, 5)) for c in (cell % 3, cell // 3))
        _stamp(pen, shape, COLOURS[colour], x, y, r)
        things.append(Thing(shape, colour, int(cell), x, y))
    return image, things


def _stamp(
    pen: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int], x: int, y: int, r: int
) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
    elif shape == "cross":
        t = max(2, r // 3)
        pen.rectangle((x - r, y - t, x + r, y + t), fill=fill)
        pen.rectangle((x - t, y - r, x + t, y + r), fill=fill)
    else:
        pen.ellipse(box, outline=fill, width=3)


def ask(
    things: Sequence[Thing], rng: np.random.Generator, mix: Sequence[float] | None = None
) -> Question:
    """One question with its one-word answer; kinds that do not fit the scene are drawn again.

    mix  the probabilities of KINDS, even by default
    """
    shapes, colours = [t.shape for t in things], [t.colour for t in things]
    lone_shape = [t for t in things if shapes.count(t.shape) == 1]
    lone_colour = [t for t in things if colours.count(t.colour) == 1]
    even = [1 / len(KINDS)] * len(KINDS)
    while True:
        kind = KINDS[rng.choice(len(KINDS), p=even if mix is None else mix)]
        if kind == "color" and lone_shape:
            t = lone_shape[rng.integers(len(lone_shape))]
            return Question(f"what color is the {t.shape} ?", t.colour, kind)
        if kind == "shape" and lone_colour:
            t = lone_colour[rng.integers(len(lone_colour))]
            return Question(f"what shape is the {t.colour} object ?", t.shape, kind)
        if kind == "count":
            return Question("how many objects ?", NUMBERS[len(things)], kind)
        if kind == "where" and lone_shape:
            t = lone_shape[rng.integers(len(lone_shape))]
            return Question(f"where is the {t.shape} ?", PLACES[t.cell], kind)
        if kind == "rel" and len(lone_shape) >= 2:
            a, b = (lone_shape[i] for i in rng.permutation(len(lone_shape))[:2])
            relation = str(rng.choice(RELATIONS))
            apart = a.x - b.x if relation.endswith("_of") else a.y - b.y
            if abs(apart) >= 8:  # a nearer call would be unfair
                holds = apart < 0 if relation in ("left_of", "above") else apart > 0
                text = f"is the {a.shape} {relation} the {b.shape} ?"
                return Question(text, "yes" if holds else "no", kind)
        if kind == "exist":
            colour = rng.choice(list(COLOURS)) if rng.random() < 0.5 else rng.choice(colours)
            shape = rng.choice(SHAPES) if rng.random() < 0.5 else rng.choice(shapes)
            there = any(t.shape == shape and t.colour == colour for t in things)
            return Question(f"is there a {colour} {shape} ?", "yes" if there else "no", kind)


def parse(text: str) -> list[str]:
    """The words of a question as the model was taught them: lower case, punctuation apart.

    Raises ValueError naming the words that are not in the vocabulary, or if there are none at all.
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    unknown = [w for w in dict.fromkeys(words) if w not in ID]
    known = " ".join(w for w in WORDS if w not in SPECIAL)
    if unknown or not words:
        what = ", ".join(map(repr, unknown)) if unknown else "an empty question"
        raise ValueError(f"question: the pocket model does not know {what}; its words are: {known}")
    return words
