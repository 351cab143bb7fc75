"""The tables of docs/bench.md, from what `restore-ext bench ... --output` left in bench/results."""

from collections.abc import Callable, Sequence
from functools import partial

from bench.machine import ROOT
from restore_ext.bench import guard, ops, prefill, serving
from restore_ext.bench.table import Column, Row, cell, markdown, read_csv, said_of
from restore_ext.bench.ways import ALL_TOKENS

RESULTS = ROOT / "bench/results"
GUARDS = ("llava-4x192", "llava-8x512", "llava-8x1024")


def shown(name: str, columns: Sequence[Column]) -> str:
    """A CSV's rows under these columns, the notes only if there are any."""
    rows = read_csv(RESULTS / f"{name}.csv")
    full = [c for c in columns if c.key != "note" or any(row.get("note") for row in rows)]
    return f"{markdown(rows, full)}\n\n{said_of(rows)}"


def guards() -> str:
    """Speed-ups by the number of visual tokens, a table a model, and where each begins to pay."""
    parts = []
    for name in GUARDS:
        rows = read_csv(RESULTS / name / "guard.csv")
        parts += [_by_tokens(rows), said_of(rows)]
    return "\n\n".join(parts)


def _by_tokens(rows: Sequence[Row]) -> str:
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != ALL_TOKENS]
    stock = Column("prefill_ms", "", spread=True)
    speedup = Column("speedup", "", spread=True)
    table: dict[str, Row] = {}
    for row in rows:
        line = table.setdefault(row["before"], {"before": row["before"]})
        if row["way"] == ALL_TOKENS:
            line["stock"] = cell(row, stock)
        else:
            line["kept"] = row["tokens"]
            line[row["way"]] = cell(row, speedup)
    pays = guard.break_evens(rows)
    table["pays"] = {"before": "pays from"} | {w: str(pays[w] or "never") for w in ways}
    titles = {"before": "visual tokens", "kept": "kept", "stock": "all tokens, ms"}
    columns = [Column(key, title) for key, title in titles.items()]
    columns += [Column(way, f"{way}, speed-up") for way in ways]
    return markdown(list(table.values()), columns)


TABLES: dict[str, Callable[[], str]] = {
    "methods-pocket": partial(shown, "pocket/methods", prefill.COLUMNS),
    "methods-random": partial(shown, "llava-8x512/methods", prefill.COLUMNS),
    "model": partial(shown, "pocket/model", serving.COLUMNS),
    "concurrency": partial(shown, "pocket-at-once/model", serving.COLUMNS),
    "attention": partial(shown, "pocket/attention", serving.ATTENTION_COLUMNS),
    "ops": partial(shown, "ops/ops", ops.COLUMNS),
    "guard": guards,
}
