"""What a schedule may take: a share of all multiply-adds, or milliseconds on this machine."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median

import numpy as np

from restore_ext.search.cost import Counts
from restore_ext.search.trials import Trial

Knots = list[tuple[int, float]]  # tokens in every layer that can be cut, milliseconds
PARTS = 4  # of the tokens of an image, between knots


class FlopsBudget:
    """At most `limit` of the multiply-adds that all tokens take; share() says how much it is."""

    def __init__(self, limit: float, share: Callable[[Counts], float]) -> None:
        self._limit, self._share = limit, share

    def cost(self, counts: Counts) -> float:
        return self._share(counts)

    def fits(self, counts: Counts) -> bool:
        return self.cost(counts) <= self._limit

    def allows(self, trial: Trial) -> bool:
        """Whether a schedule that was measured is within the budget."""
        return trial.costs["flops"] <= self._limit

    def learn(self, trials: Sequence[Trial]) -> None:
        """Nothing: a formula is right at once."""


class LatencyBudget:
    """At most `limit` milliseconds, by the clock. Before that, by what constant schedules took: a
    layer's time for some tokens lies on a line between theirs, and trials correct the sum."""

    def __init__(self, limit: float, first: int, knots: Knots) -> None:
        self._limit, self._first, self._slow = limit, first, 1.0
        self._tokens = [count for count, _ in knots]
        self._times = list(accumulate((time for _, time in knots), max))  # noise must not fall

    def cost(self, counts: Counts) -> float:
        """Milliseconds: the mean over layers of what a model of such layers alone would take."""
        return float(np.interp(counts[self._first :], self._tokens, self._times).mean())

    def fits(self, counts: Counts) -> bool:
        return self._slow * self.cost(counts) <= self._limit

    def allows(self, trial: Trial) -> bool:
        return trial.costs["latency_ms"] <= self._limit

    def learn(self, trials: Sequence[Trial]) -> None:
        """Aims lower, if trials took longer than predicted; never below what is possible."""
        ratios = [t.costs["latency_ms"] / self.cost(t.counts) for t in trials]
        lowest = self._limit / self._times[0] * (1 - 1e-9)
        self._slow = max(1.0, min(median(ratios), lowest)) if ratios else 1.0


Budget = FlopsBudget | LatencyBudget


def knot_counts(n: int) -> list[int]:
    """The constant schedules to time: 0, n / 4, ... n tokens."""
    return sorted({n * part // PARTS for part in range(PARTS + 1)})
