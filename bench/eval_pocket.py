"""Measures what every way of reducing tokens costs the built-in model in accuracy.

    python -m bench.eval_pocket    asks all questions; goes on where it was interrupted
    python -m bench.tables         writes the tables into README.md and docs/pocket.md, of them

The answers are kept in bench/results/pocket_eval.json, question by question, so that more questions
or configurations only add to them. Answers of other weights are not mixed: they are asked anew.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from bench.machine import ROOT
from restore_ext.cli.load import quiet
from restore_ext.pocket import load_pocket
from restore_ext.pocket.answers import evaluate, kept, made, unpack
from restore_ext.pocket.eval import Batch, Right, answer, configurations, main_configurations
from restore_ext.pocket.table import brief, markdown

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
    command = f"python -m bench.eval_pocket --questions {a.questions} --backend {a.backend}"
    start = time.perf_counter()
    with tqdm(unit="question") as bar:

        def done(now: int, total: int) -> None:
            bar.total = total
            bar.update(now)

        facts = made(command, a.workers)
        asked = functools.partial(answer_all, a=a)
        given = (chosen, a.questions, asked, a.results, facts)
        evaluate(*given, batch=a.batch, fresh=a.fresh, done=done)
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


def tables(results: Path = RESULTS) -> str:
    """The tables of the answers kept, with what they were made with."""
    right, how, lacking = _enough(results)
    asked = f" Not asked yet, or not all: {', '.join(lacking)}." if lacking else ""
    return f"{markdown(right)}\n\n{how}{asked}"


def brief_table(results: Path = RESULTS) -> str:
    """The one table of the README."""
    right, how, _ = _enough(results, {c.name for c in main_configurations()})
    return f"{brief(right)}\n\n{how}"


def _enough(results: Path, names: Container[str] | None = None) -> tuple[Right, str, list[str]]:
    """The answers of configurations that were asked enough, how they were made, and the methods
    that have others; names: of those configurations alone."""
    rows = {n: row for n, row in kept(results).items() if row["questions"] >= ENOUGH}
    if names is not None:
        rows = {n: row for n, row in rows.items() if n in names}
    if not rows:
        raise ValueError(f"{results} must have {ENOUGH} answers of some configuration, has none")
    facts = json.loads(results.read_text())["made"]
    right = {n: unpack(row["right"], row["questions"]) for n, row in rows.items()}
    lacking = dict.fromkeys(c.name.split("/")[0] for c in configurations() if c.name not in rows)
    commits = ", ".join(dict.fromkeys(c for row in rows.values() for c in row["commits"]))
    how = (
        f"`{facts['command']}`, then `python -m bench.tables`: {facts['machine']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}, commit {commits}, weights "
        f"{facts['weights']}."
    )
    return right, how, list(lacking)


if __name__ == "__main__":
    main()
