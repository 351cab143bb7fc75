"""The tables of docs/bench.md, from what `restore-ext bench ... --output` and bench.cpu left in
bench/results."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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


def cpu_lines() -> str:
    """What `python -m bench.cpu --json` kept: every line, and what it was measured with."""
    kept = json.loads((RESULTS / "cpu_avx2.json").read_text())
    titles = {"op": "what", "case": "case", "dtype": "dtype", "peer": "beside"}
    columns = [Column(key, title, number=False) for key, title in titles.items()]
    columns.append(Column("ratio", "peer's time to ours", spread=True))
    columns += [Column(name, name) for name in ("bar", "goal", "reached")]
    rows = []
    for row in kept["rows"]:
        wanted = {name: "" if row[name] is None else str(row[name]) for name in ("bar", "goal")}
        ratio = {"ratio": row["ratio"], "ratio_p20": row["low"], "ratio_p80": row["high"]}
        names = {name: row[name] for name in titles}
        rows.append(names | {k: str(v) for k, v in ratio.items()} | wanted | reached(row))
    made = kept["made"]
    said = "`{command}`: {machine}, level {level}, torch {torch}, commit {commit}".format(**made)
    return f"{markdown(rows, columns)}\n\n{said}."


def reached(row: dict[str, Any]) -> Row:
    """Which of bar and goal a line has reached; "" for one without them."""
    wanted = [name for name in ("bar", "goal") if row[name] is not None]
    met = [name for name in wanted if row["ratio"] >= row[name]]
    return {"reached": met[-1] if met else "below" if wanted else ""}


TABLES: dict[str, Callable[[], str]] = {
    "methods-pocket": partial(shown, "pocket/methods", prefill.COLUMNS),
    "methods-random": partial(shown, "llava-8x512/methods", prefill.COLUMNS),
    "model": partial(shown, "pocket/model", serving.COLUMNS),
    "concurrency": partial(shown, "pocket-at-once/model", serving.COLUMNS),
    "attention": partial(shown, "pocket/attention", serving.ATTENTION_COLUMNS),
    "ops": partial(shown, "ops/ops", ops.COLUMNS),
    "guard": guards,
    "cpu": cpu_lines,
}
