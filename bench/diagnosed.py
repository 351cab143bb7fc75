"""The tables of docs/diagnose.md, from what `restore-ext diagnose` wrote into its diagnosis.json.

bench/results/diagnose has that file of each method; tools/pictures.py draws the curves from them.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.machine import ROOT
from restore_ext.hf.diagnosis.maps import TITLES
from restore_ext.hf.diagnosis.probe import QUERIES
from restore_ext.hf.diagnosis.table import number, rows
from restore_ext.pocket.table import as_table

RESULTS = ROOT / "bench/results/diagnose"


def kept(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(name: str) -> str:
    """What the command prints, the distances by the kind of query, and on what it was measured."""
    summary = kept(name)
    titles, *lines = rows(summary)
    ways = [
        [TITLES[way], *(number(found["distance"][of]) for of in QUERIES)]
        for way, found in summary["ways"].items()
    ]
    kinds = ["distance, by queries", *QUERIES]
    made = summary["made"]
    how = (
        f"`{made['command']}`: mean of {summary['prompts']} scenes, ± 95 % interval; "
        f"{made['machine']}, torch {made['torch']}, transformers {made['transformers']}, commit "
        f"{made['commit']}, {made['when']}."
    )
    return "\n\n".join([as_table(titles, lines), as_table(kinds, ways), how])


TABLES: dict[str, Callable[[], str]] = {
    "diagnose-divprune": partial(table, "divprune"),
    "diagnose-fastv": partial(table, "fastv"),
}
