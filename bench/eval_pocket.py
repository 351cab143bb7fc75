"""Measures what every way of reducing tokens costs the built-in model in accuracy.

    python -m bench.eval_pocket    asks all questions; goes on where it was interrupted
    python -m bench.tables         writes the tables into README.md, from the answers kept

The answers are kept in bench/results/pocket_eval.json, question by question, so that more questions
or configurations only add to them. Answers of other weights are not mixed: they are asked anew.
"""

import argparse
import functools
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from bench.machine import ROOT, machine
from restore_ext.cli.load import quiet
from restore_ext.pocket import load_pocket
from restore_ext.pocket.eval import Batch, Configuration, Right, add, answer, configurations, plan
from restore_ext.pocket.model import FOLDER
from restore_ext.pocket.table import markdown

Row = dict[str, Any]
ENOUGH = 2000  # questions, for a table that is shown
RESULTS = ROOT / "bench/results/pocket_eval.json"
worker: Callable[[Batch], Right]  # of this process, see start_worker


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.eval_pocket", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--questions", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--only", default="", help="configurations whose name has this in it")
    parser.add_argument("--backend", choices=["op", "mask"], default="op")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget the answers kept")
    a = parser.parse_args(argv)
    chosen = [c for c in configurations() if a.only in c.name]
    rows = {} if a.fresh else kept(a.results)
    right = {name: unpack(row["right"], row["questions"]) for name, row in rows.items()}
    facts, commit = made(a), code()  # now: what runs is what was read when this began
    batches = [b for b in plan(a.questions, chosen, right, a.batch) if b.todo]
    start = time.perf_counter()
    with tqdm(total=sum(b.stop - b.start for b in batches), unit="question") as bar:
        for batch, answers in zip(batches, answer_all(batches, a), strict=True):
            add(right, batch, answers)
            for c in batch.todo:
                rows[c.name] = row(c, right[c.name], commit, rows.get(c.name))
            save(a.results, facts, rows)
            bar.update(batch.stop - batch.start)
    print(f"{len(chosen)} configurations, {time.perf_counter() - start:.0f} s: {a.results}")


def answer_all(batches: Sequence[Batch], a: argparse.Namespace) -> Iterator[Right]:
    """The batches' answers, in order, by several processes of few threads each: one process of
    many cannot keep the cores busy on a model of this size."""
    if a.workers == 1:
        start_worker(None, a.backend)
        yield from map(work, batches)
        return
    threads = max(1, (os.cpu_count() or 1) // a.workers)
    with get_context("spawn").Pool(a.workers, start_worker, (threads, a.backend)) as pool:
        yield from pool.imap(work, batches)


def start_worker(threads: int | None, backend: str) -> None:
    """Loads the model into this process."""
    global worker
    if threads is not None:
        torch.set_num_threads(threads)
    quiet()
    worker = functools.partial(answer, *load_pocket(), backend=backend)


def work(batch: Batch) -> Right:
    return worker(batch)


def kept(results: Path) -> dict[str, Row]:
    """The rows in `results` that are these weights' answers under today's options of that name."""
    if not results.is_file():
        return {}
    content = json.loads(results.read_text())
    if content["made"]["weights"] != fingerprint():
        print(f"{results} is of other weights: starting anew")
        return {}
    options = {c.name: c.options for c in configurations()}
    return {n: row for n, row in content["rows"].items() if row["options"] == options.get(n)}


def row(configuration: Configuration, right: list[bool], commit: str, before: Row | None) -> Row:
    commits = [] if before is None else before["commits"]
    return {
        "options": configuration.options,
        "accuracy": round(sum(right) / len(right), 4),
        "questions": len(right),
        "right": pack(right),
        "commits": commits if commit in commits else [*commits, commit],
    }


def save(results: Path, facts: dict[str, Any], rows: dict[str, Row]) -> None:
    """Writes the answers whole or not at all."""
    results.parent.mkdir(parents=True, exist_ok=True)
    new = results.with_suffix(".new")
    new.write_text(json.dumps({"made": facts, "rows": rows}, indent=1) + "\n")
    os.replace(new, results)


def made(a: argparse.Namespace) -> dict[str, Any]:
    """With what the answers were made."""
    return {
        "command": f"python -m bench.eval_pocket --questions {a.questions} --backend {a.backend}",
        "weights": fingerprint(),
        "machine": f"{machine('cpu')}, {a.workers} processes",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def code() -> str:
    """The commit, with -dirty behind if the tree is not what it says."""
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "none"


def fingerprint() -> str:
    return hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()[:16]


def pack(answers: Sequence[bool]) -> str:
    """Answers as hexadecimal, the first question in the highest bit."""
    return f"{int('1' + ''.join('01'[a] for a in answers), 2):x}"  # a leading 1 keeps the zeros


def unpack(text: str, questions: int) -> list[bool]:
    bits = f"{int(text, 16):b}"[1:]
    if len(bits) != questions:
        raise ValueError(f"right must hold {questions} answers, got {len(bits)}")
    return [bit == "1" for bit in bits]


def tables(results: Path = RESULTS) -> str:
    """The tables of the answers kept, with what they were made with."""
    facts, rows = json.loads(results.read_text())["made"], kept(results)
    rows = {n: row for n, row in rows.items() if row["questions"] >= ENOUGH}
    if not rows:
        raise ValueError(f"{results} must have {ENOUGH} answers of some configuration, has none")
    right = {n: unpack(row["right"], row["questions"]) for n, row in rows.items()}
    lacking = dict.fromkeys(c.name.split("/")[0] for c in configurations() if c.name not in rows)
    asked = f" Not asked yet, or not all: {', '.join(lacking)}." if lacking else ""
    commits = ", ".join(dict.fromkeys(c for row in rows.values() for c in row["commits"]))
    how = (
        f"`{facts['command']}`, then `python -m bench.tables`: {facts['machine']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}, commit {commits}, weights "
        f"{facts['weights']}."
    )
    return f"{markdown(right)}\n\n{how}{asked}"


if __name__ == "__main__":
    main()
