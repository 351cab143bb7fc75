"""A task's generation options as generate() takes them, and its stop sequences."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restore_ext import checks

LOGGER = logging.getLogger("restore_ext.integrations")


@dataclass(frozen=True)
class Generation:
    """options: of generate(); stops: an answer ends before the first of them."""

    options: dict[str, Any]
    stops: tuple[str, ...]

    @staticmethod
    def of(given: Mapping[str, Any], max_new_tokens: int) -> "Generation":
        """From a task's, of which what generate() does not know is passed over with a warning.

        Greedy unless temperature is above 0 and do_sample is not False.

        max_new_tokens  for a task that does not say

        raises  TypeError, ValueError: naming the option
        """
        options = dict(given)
        stops = _stops(options.pop("until", None))
        limit = options.pop("max_new_tokens", None)
        limit = checks.require_count("max_new_tokens", max_new_tokens if limit is None else limit)
        temperature = float(options.pop("temperature", None) or 0)
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        sample = options.pop("do_sample", None)
        sample = temperature > 0 and sample is not False
        answers = options.pop("num_return_sequences", None)
        if answers not in (None, 1):
            raise ValueError(f"num_return_sequences must be 1, got {answers}")
        known: dict[str, Any] = {"max_new_tokens": limit, "do_sample": sample}
        for name, value in options.items():
            if not hasattr(_stock(), name):
                _warn_once(name)
            elif sample or name not in ("top_p", "top_k"):
                known[name] = value
        if sample:
            return Generation({**known, "temperature": temperature}, stops)
        # A checkpoint's own would be warned of with every answer.
        return Generation({**known, "temperature": None, "top_p": None, "top_k": None}, stops)

    def cut(self, text: str) -> str:
        """What is said before the first stop sequence."""
        found = [at for at in map(text.find, self.stops) if at >= 0]
        return text[: min(found)] if found else text


def _stops(until: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (until,) if isinstance(until, str) else tuple(until or ())
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"until must hold texts that are not empty, got {until!r}")
    return stops


@functools.cache
def _stock() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig()


@functools.cache
def _warn_once(name: str) -> None:
    LOGGER.warning("generate() knows no %s, which a task asks for: it is passed over", name)
