"""The base methods: which tokens stay. One a file; RESTORE then merges what they would drop."""

from typing import Any

from restore_ext.methods.divprune import DIVPRUNE
from restore_ext.methods.holov import HOLOV
from restore_ext.methods.problem import Method, Problem
from restore_ext.methods.random import RANDOM
from restore_ext.methods.tome import TOME
from restore_ext.methods.uniform import UNIFORM
from restore_ext.methods.vispruner import VISPRUNER

__all__ = ["METHODS", "Method", "Problem", "find_method", "list_methods", "needs_scores"]

METHODS: dict[str, Method] = {
    "random": RANDOM,
    "uniform": UNIFORM,
    "divprune": DIVPRUNE,
    "vispruner": VISPRUNER,
    "holov": HOLOV,
    "tome": TOME,
}


def list_methods() -> list[str]:
    """The names `reduce_tokens(method=...)` knows."""
    return list(METHODS)


def needs_scores(name: str) -> bool:
    """Whether the method reads the tokens' importance; ValueError for a name that is unknown."""
    return find_method(name).needs_scores


def find_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """The method of this name, its options checked.

    raises  ValueError: an unknown name, or an option out of range
            TypeError: an option the method does not have, or one of the wrong type
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    for option, value in (options or {}).items():
        if option not in method.options:
            known = ", ".join(method.options) or "none"
            raise TypeError(f"method {name} has no option {option!r}; its options are: {known}")
        method.options[option](option, value)
    return method
