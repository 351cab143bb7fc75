"""One answer, what it cost, and the table of several."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from restore_ext.bench.generation import generate, kv_bytes, time_answer, visual_tokens
from restore_ext.reduction import Reduction
from restore_ext.stages.stage import as_groups
from restore_ext.text import aligned

if TYPE_CHECKING:
    from restore_ext.hf.report import Report, StageReport, VisualTokens

FORCED = 32  # tokens decoded against the clock, whatever they are


@dataclass(frozen=True)
class Outcome:
    """What one way of answering gave."""

    label: str
    answer: str
    tokens: "VisualTokens"
    prefill_ms: float  # picture and prompt to the first token, vision tower included
    decode_ms: float  # per token, over FORCED tokens after the first
    kv_bytes: int  # keys and values of the prompt, all layers
    reduction: Reduction | None  # of the first picture, cuts included; None where it stays whole


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
        times = [
            time_answer(self.model, self.inputs, FORCED, time.perf_counter)
            for _ in range(self.repeats)
        ]
        report = None if handle is None else handle.last
        tokens = visual_tokens(self.model, self.inputs, report)
        return Outcome(
            label,
            text,
            tokens,
            1e3 * median(prefill for prefill, _ in times),
            1e3 * median(decode for _, decode in times),
            kv_bytes(self.model, self.inputs),
            _first_picture(report) if report is not None else None,
        )

    def _text(self) -> str:
        answer = generate(self.model, self.inputs, self.max_new_tokens)
        new = answer[:, self.inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def _first_picture(report: "Report") -> Reduction:
    """What is left of the first picture of a batch of one behind the last cut."""
    parts = [report.images[0].reduction, *map(_of_first_picture, report.stages)]
    # From behind: a reduction composed with a later one may put its own tokens in another order.
    return reduce(lambda later, earlier: earlier.compose(later), reversed(parts))


def _of_first_picture(stage: "StageReport") -> Reduction:
    n, left, cut = stage.tokens_before[0], stage.tokens_after[0], stage.plan
    if cut.reduction is None:
        group = as_groups(torch.isin(cut.slots[:1, :n], cut.source))
    else:
        group = cut.reduction.group[:1, :n]
    device = group.device
    alone = (group[:, None] == torch.arange(left, device=device)[:, None]).sum(-1) == 1
    nothing, ones = torch.zeros(1, n, 1, device=device), torch.ones(1, n, device=device)
    return Reduction.of_groups(nothing, group, left, ones, alone)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as aligned text, one line each under a heading."""
    rows = [("", "answer", "visual tokens", "prefill ms", "decode ms/token", "KV bytes")]
    for o in outcomes:
        answer = " ".join(o.answer.split())
        answer = answer if len(answer) <= 40 else answer[:37] + "..."
        numbers = (f"{o.prefill_ms:.1f}", f"{o.decode_ms:.2f}", f"{o.kv_bytes:,}")
        rows.append((o.label, answer, str(o.tokens), *numbers))
    return aligned(rows, [False, False, True, True, True, True])
