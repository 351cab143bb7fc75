"""Rounds in which everybody takes a turn, and what is said of the times they took."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Reading = Callable[[], float]  # of one run, in seconds


@dataclass(frozen=True)
class Spread:
    """The median of some readings, and the percentiles between which most of them lie."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return Spread(statistics.median(values), p20, p80)

    def columns(self, name: str, scale: float = 1.0, digits: int = 2) -> dict[str, str]:
        """As three columns of a table: name, name_p20, name_p80."""
        values = {name: self.median, f"{name}_p20": self.p20, f"{name}_p80": self.p80}
        return {title: f"{scale * value:.{digits}f}" for title, value in values.items()}


def ratio(base: Sequence[float], values: Sequence[float]) -> Spread:
    """base / values, round by round: its spread is that of the comparison."""
    return Spread.of([b / v for b, v in zip(base, values, strict=True)])


def difference(base: Sequence[float], values: Sequence[float]) -> Spread:
    """base - values, round by round."""
    return Spread.of([b - v for b, v in zip(base, values, strict=True)])


def take_turns(
    readings: Mapping[str, Reading], rounds: int, done: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Every reading once in every round; `done` is called after each."""
    times: dict[str, list[float]] = {name: [] for name in readings}
    for _ in range(rounds):
        for name, reading in readings.items():
            times[name].append(reading())
            done()
    return times


def clock_of(name: str, device: torch.device) -> Reading:
    """The clock of that name, in seconds; of a GPU, once it has done what it was given."""
    watch = time.thread_time if name == "thread" else time.perf_counter
    if device.type != "cuda":
        return watch

    def after_device() -> float:
        torch.cuda.synchronize(device)
        return watch()

    return after_device
