"""P-Sigmoid: keep counts that fall with depth along a sigmoid, each curve on the budget."""

from collections.abc import Callable, Mapping
from math import exp

from restore_ext.search.cost import Counts

STEEPEST = 200.0
# Name: range of each parameter, and whether it is on a log scale.
PARAMETERS: dict[str, tuple[float, float, bool]] = {
    "low": (0.0, 1.0, False),
    "high": (0.0, 1.0, False),
    "steepness": (1.0, STEEPEST, True),
}
# Where the search starts: what anyone would try.
STARTS: tuple[dict[str, float], ...] = (
    {"low": 1.0, "high": 0.0, "steepness": 1.0},  # constant
    {"low": 0.0, "high": 1.0, "steepness": STEEPEST},  # all tokens, then none
    {"low": 0.0, "high": 1.0, "steepness": 8.0},
    {"low": 0.5, "high": 0.5, "steepness": 30.0},
)


def constant(depth: int, first: int, n: int, fits: Callable[[Counts], bool]) -> Counts | None:
    """The most tokens that all layers from `first` on can have; None if not even none fit."""
    few, many = -1, n
    while few < many:
        middle = (few + many + 1) // 2
        if fits(_flat(depth, first, n, middle)):
            few = middle
        else:
            many = middle - 1
    return None if few < 0 else _flat(depth, first, n, few)


def psigmoid(
    depth: int, first: int, n: int, params: Mapping[str, float], fits: Callable[[Counts], bool]
) -> Counts:
    """The counts of every layer under a budget.

    A layer l of L, at depth x = l / (L - 1), keeps the share low + (high - low) / (1 + exp(a (x -
    b))) of n tokens, rounded down. The published form of P-Sigmoid (arXiv 2412.00556) was not to be
    had; this one is ours. With c the share of the constant schedule that just fits, `low` of params
    is low as a share of c, `high` is how far high is from c to 1, and a is `steepness`. What is
    left, b, is not free: it is the largest that fits. As low <= c <= high there is one for every
    point of the cube, so no trial is lost to the budget.

    fits    whether counts are within the budget; fewer tokens than counts that fit fit, too
    raises  ValueError: nothing fits
    """
    level = constant(depth, first, n, fits)
    if level is None:
        raise ValueError("the budget must leave room for the prompt without visual tokens")
    c = level[-1] / n
    low, high = c * params["low"], c + (1 - c) * params["high"]
    a = params["steepness"]

    def at(b: float) -> Counts:
        shares = [low + (high - low) * _sigmoid(a * (b - x / (depth - 1))) for x in range(depth)]
        # A share that is a whole number of tokens but for rounding is that number.
        return (n,) * first + tuple(int(share * n + 1e-6) for share in shares[first:])

    left, right = -40 / a, 1 + 40 / a  # where the curve is flat
    if fits(at(right)):
        return at(right)
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if fits(at(middle)) else (left, middle)
    return at(left)


def _sigmoid(z: float) -> float:
    return 1 / (1 + exp(-z)) if z > -700 else 0.0


def _flat(depth: int, first: int, n: int, count: int) -> Counts:
    return (n,) * first + (count,) * (depth - first)
