"""What the options of a stage must be. A message says which, what was wanted and what came."""

from collections.abc import Sequence
from typing import Any

from restore_ext.checks import require_count, require_int, require_share


def require_layers(name: str, value: Any) -> None:
    """Rising layer indices, at least one, from 1 on."""
    numbers = _list(name, value, "layer indices")
    for i, layer in enumerate(numbers):
        lowest = numbers[i - 1] + 1 if i else 1
        if require_int(f"{name}[{i}]", layer) < lowest:
            raise ValueError(f"{name} must rise, from 1 on, got {numbers}")


def require_shares(name: str, value: Any) -> None:
    """Shares in (0, 1] that do not rise."""
    shares = _list(name, value, "shares")
    for i, share in enumerate(shares):
        require_share(f"{name}[{i}]", share, above_zero=True)
        if i and share > shares[i - 1]:
            raise ValueError(f"{name} must not rise, got {shares}")


def require_keeps(name: str, value: Any) -> None:
    """Numbers of tokens, 1 or more, that do not rise."""
    keeps = _list(name, value, "numbers of tokens")
    for i, keep in enumerate(keeps):
        require_count(f"{name}[{i}]", keep)
        if i and keep > keeps[i - 1]:
            raise ValueError(f"{name} must not rise, got {keeps}")


def require_offset(name: str, value: Any) -> None:
    if require_int(name, value) < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value}")


def _list(name: str, value: Any, what: str) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not len(value):
        raise TypeError(f"{name} must be a list of {what}, got {value!r}")
    return list(value)
