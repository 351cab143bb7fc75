"""The methods, one a file: which tokens stay. RESTORE then merges what they would drop."""

from collections.abc import Mapping
from typing import Any

from restore_ext.checks import require_one_of
from restore_ext.methods.catalogue import Card, inside
from restore_ext.methods.divprune import DIVPRUNE
from restore_ext.methods.downsample import DOWNSAMPLE
from restore_ext.methods.fastervlm import FASTERVLM
from restore_ext.methods.holov import HOLOV
from restore_ext.methods.problem import INSIDE, Method, Problem
from restore_ext.methods.random import RANDOM
from restore_ext.methods.token_pooling import TOKEN_POOLING
from restore_ext.methods.tome import TOME
from restore_ext.methods.tome_vit import TOME_VIT
from restore_ext.methods.uniform import UNIFORM
from restore_ext.methods.visionzip import VISIONZIP
from restore_ext.methods.vispruner import VISPRUNER
from restore_ext.stages import STAGE_METHODS

__all__ = [
    "ALL_TOKENS",
    "METHODS",
    "TOWER_METHODS",
    "Card",
    "Method",
    "Problem",
    "cards",
    "find_card",
    "find_method",
    "list_methods",
    "name_of",
    "named_methods",
]

# What reduce_tokens does.
METHODS: dict[str, Method] = {
    "random": RANDOM,
    "uniform": UNIFORM,
    "divprune": DIVPRUNE,
    "fastervlm": FASTERVLM,
    "vispruner": VISPRUNER,
    "holov": HOLOV,
    "visionzip": VISIONZIP,
    "tome": TOME,
    "token_pooling": TOKEN_POOLING,
}

# What takes a vision tower: attach() and prepare_inputs() alone.
TOWER_METHODS: dict[str, Method] = {"tome_vit": TOME_VIT, "downsample": DOWNSAMPLE}

ALL_TOKENS = "none"  # what servers and harnesses call no method at all


def list_methods() -> list[str]:
    """The names `attach(method=...)` knows; docs/methods.md says what each needs and does."""
    return [card.name for card in cards()]


def named_methods() -> list[str]:
    """Those that a name and a budget ask for: all but schedule, which wants tokens by layer."""
    return [name for name in list_methods() if name != "schedule"]


def cards() -> list[Card]:
    """The table of methods, row by row."""
    before = [Card.of(name, method) for name, method in (METHODS | TOWER_METHODS).items()]
    return before + [inside(name, method) for name, method in STAGE_METHODS.items()]


def find_card(name: str) -> Card:
    """The row of a method that list_methods() names.

    raises  ValueError: an unknown name
    """
    by_name = {card.name: card for card in cards()}
    require_one_of("method", name, tuple(by_name))
    return by_name[name]


def name_of(method: str, keep: int | None, schedule: str | None) -> str:
    """What reduces, in a word or two."""
    if schedule is None:
        return method
    return "schedule" if keep is None else f"{method}, schedule"


def find_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of this name in front of the language model, its options checked.

    raises  ValueError: an unknown name, one of a method that cuts inside the language model, or an
            option out of range
            TypeError: an option the method does not have, or one of the wrong type
    """
    known = METHODS | TOWER_METHODS
    if isinstance(name, str) and name in STAGE_METHODS:
        raise ValueError(f"method {name} acts {INSIDE}, so attach() alone can do it")
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, got {name!r}")
    method = known[name]
    for option, value in (options or {}).items():
        if option not in method.options:
            has = ", ".join(method.options) or "none"
            raise TypeError(f"method {name} has no option {option!r}; its options are: {has}")
        method.options[option](option, value)
    return method
