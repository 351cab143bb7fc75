"""One answer, what it cost, and the table of several."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from restore_ext.reduction import Reduction

FORCED = 32  # tokens decoded against the clock, whatever they are


@dataclass(frozen=True)
class Outcome:
    """What one way of answering gave."""

    label: str
    answer: str
    visual_tokens: int
    prefill_ms: float  # picture and prompt to the first token, vision tower included
    decode_ms: float  # per token, over FORCED tokens after the first
    kv_bytes: int  # keys and values of the prompt, all layers
    reduction: Reduction | None  # of the first picture, None where nothing was reduced


@dataclass(frozen=True)
class Task:
    """A model with its inputs, ready to be answered in several ways."""

    model: Any
    processor: Any
    inputs: dict[str, Any]
    max_new_tokens: int
    repeats: int  # timings to take the median of

    def answer(self, label: str, handle: Any = None) -> Outcome:
        """Answers greedily with the model as it is; `handle` is what attach() gave, if anything.

        The answer itself is the warm-up of the timings.
        """
        text = self._text()
        kv_bytes = self._kv_bytes()
        times = [self._clock() for _ in range(self.repeats)]
        report = None if handle is None else handle.last
        images = [] if report is None else report.images
        token = self.model.config.image_token_id
        before = int((self.inputs["input_ids"] == token).sum())
        saved = sum(image.tokens_before - image.tokens_after for image in images)
        return Outcome(
            label,
            text,
            before - saved,
            median(prefill for prefill, _ in times),
            median(decode for _, decode in times),
            kv_bytes,
            images[0].reduction if images else None,
        )

    def _generate(self, new_tokens: int, **options: Any) -> Any:
        with torch.no_grad():
            return self.model.generate(
                **self.inputs, do_sample=False, num_beams=1, max_new_tokens=new_tokens, **options
            )

    def _text(self) -> str:
        new = self._generate(self.max_new_tokens)[:, self.inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)[0].strip()

    def _kv_bytes(self) -> int:
        """Counted in the cache itself, which after one new token holds the prompt and no more."""
        cache = self._generate(1, return_dict_in_generate=True).past_key_values
        tensors = (t for layer in cache.layers for t in (layer.keys, layer.values))
        return sum(t.numel() * t.element_size() for t in tensors)

    def _clock(self) -> tuple[float, float]:
        """Prefill and decode milliseconds of one generation of 1 + FORCED tokens."""
        watch = _Watch()
        start = time.perf_counter()
        self._generate(1 + FORCED, min_new_tokens=1 + FORCED, streamer=watch)
        first, last = watch.times[1], watch.times[1 + FORCED]  # times[0] is the prompt's
        return 1e3 * (first - start), 1e3 * (last - first) / FORCED


class _Watch:
    """A streamer that notes when it is handed the prompt and then each token, on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be flushed."""


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as aligned text, one line each under a heading."""
    rows = [("", "answer", "visual tokens", "prefill ms", "decode ms/token", "KV bytes")]
    for o in outcomes:
        answer = " ".join(o.answer.split())
        answer = answer if len(answer) <= 40 else answer[:37] + "..."
        numbers = (f"{o.prefill_ms:.1f}", f"{o.decode_ms:.2f}", f"{o.kv_bytes:,}")
        rows.append((o.label, answer, str(o.visual_tokens), *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        words = [c.ljust(w) for c, w in zip(row[:2], widths[:2], strict=True)]
        numbers_of_row = [c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*words, *numbers_of_row]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
