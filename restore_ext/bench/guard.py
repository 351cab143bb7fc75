"""From how many visual tokens on a reduction pays: what `min_visual_tokens` is to be.

A model of LLaVA's shape is built for every number of tokens; its weights are random, its times are
a model's. The more a token costs in the language model, the sooner a reduction pays.
"""

from collections.abc import Callable, Sequence

import torch

from restore_ext.bench import prefill
from restore_ext.bench.random_llava import Shape, build, prompt
from restore_ext.bench.rounds import Reading
from restore_ext.bench.table import Column, Row
from restore_ext.bench.ways import ALL_TOKENS, ways_of
from restore_ext.methods import find_card

COLUMNS = (
    prefill.COLUMNS[0],
    Column("before", "visual tokens"),
    Column("tokens", "kept"),
    *prefill.COLUMNS[2:],
)


def measure_guard(
    layers: int,
    hidden: int,
    sides: Sequence[int],
    share: float,
    methods: Sequence[str],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    clock: Reading,
    done: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Rows of measure_prefills() for pictures of side x side tokens, `share` of which stay."""
    rows: list[Row] = []
    for side in sides:
        shape = Shape.of(layers, hidden, side)
        model, inputs = build(shape, device, dtype), prompt(shape, 1, device, dtype)
        keep = max(1, round(share * side**2))
        ways = ways_of(methods, keep, model, inputs)
        ways = [w for w in ways if w.method is None or w.restore == find_card(w.method).restores]
        found = prefill.measure_prefills(model, inputs, ways, rounds, clock, done)
        rows += [{"before": str(side**2)} | row for row in found]
    return rows


def break_evens(rows: Sequence[Row]) -> dict[str, int | None]:
    """For every way, the fewest visual tokens from which on it is faster at every number measured,
    by the 20th percentile of its speed-up; None if there is no such number."""
    fewest: dict[str, int | None] = {}
    for way in dict.fromkeys(row["way"] for row in rows if row["way"] != ALL_TOKENS):
        pays = None
        of_way = [row for row in rows if row["way"] == way and row.get("speedup")]
        for row in sorted(of_way, key=lambda row: -int(row["before"])):
            if float(row["speedup_p20"]) <= 1:
                break
            pays = int(row["before"])
        fewest[way] = pays
    return fewest
