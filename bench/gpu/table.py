"""Tables of what GPUs have run: their numbers, and the proof, kernel by kernel."""

import re
from collections.abc import Iterator
from pathlib import Path

from bench import machine
from bench.gpu.collect import Proof
from bench.provider import OURS
from bench.rows import read

Row = dict[str, str]
# How a call is timed, the most telling first: for a short one without what launching it costs.
WAYS = (("graph", "warm"), ("call", "cold"))
STAGES = ("tests", "sanitizer", "bench")


def numbers(results: Path) -> str:
    """A table for each GPU that has rows; a sentence if none has."""
    tables = []
    for file in sorted(results.glob("*.csv")):
        rows = [row for row in read(file) if row["driver"]]
        if rows:
            tables.append("\n".join(of_gpu(file.stem.replace("_", " "), rows)))
    if tables:
        return "\n\n".join(tables)
    return "No GPU has run the CUDA kernels yet, so there are no numbers of them."


def of_gpu(gpu: str, rows: list[Row]) -> Iterator[str]:
    newest = rows[-1]["source"]
    rows = [row for row in rows if row["source"] == newest]
    made = "driver {driver}, torch {torch}, commit {commit}".format(**rows[-1])
    yield f"{gpu}, {made}, `bench/gpu_proof.sh --stage bench`."
    yield "A number after a name is its time over ours: above 1, we are faster.\n"
    yield "| operator | problem | timed | us | others |"
    yield "| --- | --- | --- | --- | --- |"
    problems = dict.fromkeys((r["op"], r["case"], r["dtype"]) for r in rows)
    for op, case, dtype in problems:
        of_case = [r for r in rows if (r["op"], r["case"], r["dtype"]) == (op, case, dtype)]
        way, ours, others = telling(of_case)
        if ours is None:
            continue
        said = ", ".join(against(row, ours) for row in others)
        by = f" {ours['note']}" if ours["note"] else ""  # which of our kernels
        yield f"| {op} | {case} {dtype} | {way} | {ours['us']}{by} | {said} |"
    absent = {f"{r['provider']} ({r['note']})" for r in rows if r["note"] and not r["us"]}
    if absent:
        yield f"\nNot timed, on some problem at least: {'; '.join(sorted(absent))}."
    if any(in_half(r) for r in rows):
        yield "\n\\* computes in half precision what we compute in float32: its answer differs."


def telling(rows: list[Row]) -> tuple[str, Row | None, list[Row]]:
    """How it was timed, our last row of that, and everybody else's."""
    for how, cache in WAYS:
        timed = {
            r["provider"]: r for r in rows if (r["how"], r["cache"]) == (how, cache) and r["us"]
        }
        if OURS in timed:
            return f"{how}, {cache} L2", timed.pop(OURS), list(timed.values())
    return "", None, []


def in_half(row: Row) -> bool:
    return bool(row["us"]) and row["note"].startswith("half precision")


def against(row: Row, ours: Row) -> str:
    """Medians of rounds that took turns. The ratio's own spread is in the CSV."""
    star = "\\*" if in_half(row) else ""
    return f"{row['provider']}{star} {float(row['us']) / float(ours['us']):.2f}"


def proof_table(proof: Proof) -> str:
    """Every file of kernels: at which commit it last ran on a GPU, and what passed with it."""
    lines = [
        "| kernels | ran on a GPU | tests | compute-sanitizer | bench |",
        "| --- | --- | --- | --- | --- |",
    ]
    for stem, now in machine.kernels().items():
        names = launched_names((machine.ROOT / "csrc/cuda" / f"{stem}.cu").read_text())
        cells = cells_of(stem, now, names, proof)
        lines.append(f"| `{stem}.cu` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cells_of(stem: str, now: str, names: list[str], proof: Proof) -> list[str]:
    """A stage proves a kernel on the GPU, and with the sources, where it was seen launched."""
    cells: list[list[str]] = [[] for _ in range(1 + len(STAGES))]
    for gpu, stages in proof.items():
        seen = stages.get("launches")
        if seen is None or not any(launches(seen.get("launched", []), name) for name in names):
            continue
        cells[0].append(said(gpu, stem, now, seen))
        for i, prefix in enumerate(STAGES, 1):
            good = [
                record
                for name, record in stages.items()
                if name.startswith(prefix) and record["source"] == seen["source"]
            ]
            cells[i] += [
                f"{r['stage'].removeprefix(prefix).lstrip('-')}: {r['commit']}" for r in good
            ]
    return ["; ".join(cell) or "never" for cell in cells]


def said(gpu: str, stem: str, now: str, record: dict) -> str:
    since = "" if record["kernels"].get(stem) == now else ", changed since"
    return f"{record['commit']} on {gpu}{since}"


def launches(events: list[str], name: str) -> bool:
    """Whether a kernel of ours is among the events, whose names may be mangled."""
    whole = re.compile(rf"(?<![a-z_]){name}(?![a-z_0-9])")
    return any("restore_ext" in event and whole.search(event) for event in events)


def launched_names(text: str) -> list[str]:
    """The functions that a file declares __global__."""
    names = []
    for part in text.split("__global__")[1:]:
        part = re.sub(r"__\w+__\s*\((?:[^()]|\([^()]*\))*\)", " ", part)  # launch bounds
        names += re.findall(r"(\w+)\s*\(", part)[:1]
    return names
