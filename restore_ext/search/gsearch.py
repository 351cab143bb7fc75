"""G-Search: layer by layer, the fewest tokens that still do."""

from collections.abc import Callable
from math import ceil, log2

from restore_ext.search.cost import Counts


def gsearch(depth: int, first: int, n: int, does: Callable[[Counts], bool]) -> Counts:
    """The counts of every layer, never rising (G-Search, arXiv 2412.00556).

    From layer `first` to the last: the fewest tokens k_l <= k_{l-1} under which the model still
    does, by binary search, the layers behind having k_l too; then they are frozen. If a model that
    does with some counts does with more, no layer of the result can have fewer, given those before
    it. The result itself was seen to do (or is all n, which is taken to).

    depth  layers; first  the first that may have fewer than n tokens
    does   whether the model still answers as well, with these counts
    """
    counts = (n,) * depth
    for layer in range(first, depth):
        few, enough = 0, counts[layer - 1]
        while few < enough:
            middle = (few + enough) // 2
            if does(counts[:layer] + (middle,) * (depth - layer)):
                enough = middle
            else:
                few = middle + 1
        counts = counts[:layer] + (enough,) * (depth - layer)
    return counts


def most_steps(depth: int, first: int, n: int) -> int:
    """The most schedules it may ask about."""
    return (depth - first) * ceil(log2(n + 1))
