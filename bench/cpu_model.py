"""The whole in `python -m bench.cpu`: a prefill at 64 of 576 visual tokens beside all of them.

The hooked and the unhooked model are one set of weights and take turns; what the reduction takes
is told by a stopwatch in a run of its own in the same round (restore_ext.profiling).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bench.harness import us
from restore_ext.bench.generation import Inputs, time_answer, time_reduction
from restore_ext.bench.random_llava import Shape, build, prompt
from restore_ext.bench.rounds import Spread, ratio, take_turns
from restore_ext.bench.ways import Way
from restore_ext.reduce import DEFAULT_METHOD

KEEP = 64
LARGER = Shape.of(layers=8, hidden=512, side=24)
METHODS = (DEFAULT_METHOD, "divprune")
MOST_ROUNDS = 50
Subject = tuple[Any, Inputs]


@dataclass(frozen=True)
class WholeLine:
    """A line about a model: which of the times of a round is held against which."""

    op: str
    case: str
    subject: Callable[[], Subject]
    method: str
    peer: str
    parts: tuple[str, str]  # the peer's and ours
    bar: float | None = None
    goal: float | None = None
    dtype: str = "float32"

    def measure(self, seconds: float) -> dict[str, Any]:
        times = rounds(self.subject, self.method, seconds)
        peer, ours = (times[part] for part in self.parts)
        spread = ratio(peer, ours)
        said = {"op": self.op, "case": self.case, "dtype": self.dtype, "peer": self.peer}
        ratios = {"ratio": spread.median, "low": spread.p20, "high": spread.p80}
        medians = {"peer_us": us(Spread.of(peer).median), "us": us(Spread.of(ours).median)}
        rounded = {name: round(value, 2) for name, value in ratios.items()}
        return said | rounded | {"bar": self.bar, "goal": self.goal} | medians


def lines() -> Iterator[WholeLine]:
    """Of each model and method: with the vision tower, without it, and the reduction's share."""
    for name, subject in {"pocket": pocket, str(LARGER): larger}.items():
        for method in METHODS:
            given = (f"{name}, {KEEP} kept, {method} + RESTORE", subject, method)
            peer = "the unhooked model"
            yield WholeLine("prefill", *given, peer, ("all", "kept"))
            parts = ("all but the tower", "kept but the tower")
            yield WholeLine("prefill without the vision tower", *given, peer, parts)
            # On the larger one less than 5 % of the prefill.
            bar = 20.0 if subject is larger else None
            yield WholeLine("reduction", *given, "the prefill it is in", ("kept", "reduction"), bar)


def pocket() -> Subject:
    from restore_ext.cli.load import encode_prompt, load, quiet
    from restore_ext.pocket import held_out

    quiet()
    model, processor = load("pocket", "cpu", "float32")
    scene = held_out(0)
    return model, encode_prompt("pocket", processor, scene.image, scene.question.text, model)


def larger() -> Subject:
    return build(LARGER, "cpu", torch.float32), prompt(LARGER, 1, "cpu", torch.float32)


@cache  # for the lines that share them
def rounds(subject: Callable[[], Subject], method: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each part of a prefill, round by round."""
    model, inputs = subject()
    way = Way(method, True, {"keep": KEEP})
    clock = time.thread_time
    tower: dict[str, list[float]] = {"all": [], "kept": []}
    reduction: list[float] = []

    def all_tokens() -> float:
        with tower_time(model, clock) as spent:
            prefill, _ = time_answer(model, inputs, 0, clock)
        tower["all"].append(sum(spent))
        return prefill

    def kept() -> float:
        with way.attached(model):
            with tower_time(model, clock) as spent:
                prefill, _ = time_answer(model, inputs, 0, clock)
            tower["kept"].append(sum(spent))
            reduction.append(time_reduction(model, inputs, clock))
        return prefill

    readings = {"all": all_tokens, "kept": kept}
    start = clock()
    take_turns(readings, 1)  # warms up
    slowest = (clock() - start) / 2
    for seen in (*tower.values(), reduction):
        seen.clear()
    count = max(2 if seconds == 0 else 7, min(MOST_ROUNDS, int(seconds / slowest)))
    times = take_turns(readings, count)
    rest = {
        f"{name} but the tower": [t - v for t, v in zip(seen, tower[name], strict=True)]
        for name, seen in times.items()
    }
    return times | rest | {"reduction": reduction}


@contextmanager
def tower_time(model: Any, clock: Callable[[], float]) -> Iterator[list[float]]:
    """A list that gets the seconds of each pass through the vision tower."""
    spent: list[float] = []
    begun: list[float] = []
    tower = model.model.vision_tower
    hooks = [
        tower.register_forward_pre_hook(lambda *_: begun.append(clock())),
        tower.register_forward_hook(lambda *_: spent.append(clock() - begun.pop())),
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
