"""What an engine was asked for: `restore_ext` of --hf-overrides, as the settings of attach()."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from restore_ext.hf.settings import DEFAULT_LAYER0, Settings, make_settings
from restore_ext.methods.problem import PROJECTED
from restore_ext.reduce import DEFAULT_ANCHOR_MODE, DEFAULT_METHOD, DEFAULT_RETAIN

KEY = "restore_ext"  # of the overrides, and of the config they come to
DEFAULTS: dict[str, Any] = {
    "method": DEFAULT_METHOD,
    "options": None,
    "keep": None,
    "keep_ratio": None,
    "restore": True,
    "positions": None,
    "calibrate": None,
    "retain": DEFAULT_RETAIN,
    "anchor_mode": DEFAULT_ANCHOR_MODE,
    "seed": 0,
}


def read_options(given: Any, axes: int) -> Settings:
    """The settings, with the defaults of attach() but for calibrate, which is "size" at most.

    given  a dict of options of attach(), one of them keep or keep_ratio
    axes   of a position: 3 for M-RoPE, 1 for RoPE

    raises  TypeError, ValueError, NotImplementedError: naming what was wanted and what came
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{KEY} must be a dict of options, got {given!r}")
    if unknown := given.keys() - DEFAULTS.keys():
        raise TypeError(
            f"{KEY} must have options {', '.join(DEFAULTS)}; got {', '.join(sorted(unknown))}"
        )
    if given.get("calibrate") == "size+distance":
        raise NotImplementedError(
            f"{KEY}: calibrate must be 'size' or 'none', got 'size+distance': vLLM's attention "
            "takes no bias, and the distance term does not fold into a few channels of the keys"
        )
    if isinstance(given.get("keep"), (list, tuple)):
        raise ValueError(
            f"{KEY}: keep must be one int, for the scheduler counts tokens before any image is "
            f"seen, got {given['keep']!r}"
        )
    settings = make_settings(
        axes=axes,
        budget="per_image",
        layer0=DEFAULT_LAYER0,
        decode_distance=False,
        backend="op",
        min_visual_tokens=0,
        **{**DEFAULTS, **given},
    )
    if settings.chosen.place != PROJECTED:
        raise NotImplementedError(
            f"{KEY}: method must act behind the projector, got {settings.method!r}: use attach()"
        )
    return dataclasses.replace(settings, calibrate="size") if settings.distance else settings


def tokens_left(settings: Settings, tokens: int) -> int:
    """Of an image of so many."""
    return min(tokens, settings.budgets([tokens], [0], [0])[0])


def cache_key(settings: Settings) -> str:
    """All that decides what becomes of an image: the same words, the same tokens."""
    return repr(sorted((name, getattr(settings, name)) for name in DEFAULTS))
