"""A small real model to see and measure visual token reduction with; it needs no download."""

from restore_ext.pocket.model import POCKET_NAME, encode, is_pocket, load_pocket, resolve
from restore_ext.pocket.scenes import WORDS, Question, Scene, Thing, ask, draw, held_out, parse

__all__ = [
    "POCKET_NAME",
    "WORDS",
    "Question",
    "Scene",
    "Thing",
    "ask",
    "draw",
    "encode",
    "held_out",
    "is_pocket",
    "load_pocket",
    "parse",
    "resolve",
]
