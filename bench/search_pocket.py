"""Searches schedules for the built-in model, and asks held-out questions of what is found.

Goes on where it was interrupted. python -m bench.tables makes the table of docs/search.md of it.

Each schedule found stands against the simplest ones that take as many multiply-adds: one number of
tokens in all layers behind the first, rated as in the search or evenly spaced, and one in all
layers, picked evenly spaced on the way in. The questions of the search are of other scenes.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.eval_pocket import answer_all
from bench.machine import commit
from restore_ext.cli.load import quiet
from restore_ext.pocket import answers, load_pocket
from restore_ext.pocket.answers import pack, unpack
from restore_ext.pocket.eval import Configuration, Right, accuracy, add, difference, plan
from restore_ext.pocket.shared import remembered_features
from restore_ext.search import find_schedule, first_token, flops, log_likelihood
from restore_ext.search.examples import pocket_examples

RESULTS = Path("bench/results/search_pocket.json")
JOURNALS = Path("build/search_pocket")  # what a run that is stopped leaves to the next
ENOUGH = 1000  # questions, for a table that is shown
TOKENS, TEXT = 576, 14  # of a prompt; the questions' mean length, to compare schedules by
BATCH = 16
BUDGET, TOLERANCE = 0.5, 0.02

SEARCHES: dict[str, dict[str, Any]] = {
    "psigmoid, attention": {"score": log_likelihood, "budget": BUDGET, "scores": "attention"},
    "psigmoid, evenly spaced": {"score": log_likelihood, "budget": BUDGET, "scores": "none"},
    "gsearch, attention": {
        "score": first_token,
        "algorithm": "gsearch",
        "tolerance": TOLERANCE,
        "scores": "attention",
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.search_pocket", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--search-questions", type=int, default=128)
    parser.add_argument("--trials", type=int, default=20, help="of each search by psigmoid")
    parser.add_argument("--questions", type=int, default=1024, help="held-out ones")
    parser.add_argument("--workers", type=int, default=1, help="processes that answer")
    parser.add_argument("--backend", choices=["op", "mask"], default="op")
    parser.add_argument("--only", default="", help="searches whose name has this in it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--journals", type=Path, default=JOURNALS)
    a = parser.parse_args(argv)
    quiet()
    model, processor = load_pocket()
    facts, began = made(a), commit()  # now: what runs is what was read when this began
    start = time.perf_counter()
    found = search(model, processor, a)
    rivals = {name: against(model.config, f["layers"], f["scores"]) for name, f in found.items()}
    asked = [Configuration("full")]
    asked += [Configuration(name, {"schedule": f}) for name, f in found.items()]
    asked += list({c.name: c for others in rivals.values() for c in others}.values())
    right = kept(a.results, facts, asked)
    batches = [batch for batch in plan(a.questions, asked, right, BATCH) if batch.todo]
    with tqdm(total=len(batches), unit="batch") as bar:
        for batch, given in zip(batches, answer_all(batches, a), strict=True):
            add(right, batch, given)
            rows = [row(model.config, c, right[c.name]) for c in asked]
            said = {name: [c.name for c in others] for name, others in rivals.items()}
            save(a.results, {"made": {**facts, "commit": began}, "rivals": said, "rows": rows})
            bar.update()
    print(f"{time.perf_counter() - start:.0f} s: {a.results}")


def search(model: Any, processor: Any, a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The schedule of each search, by name."""
    a.journals.mkdir(parents=True, exist_ok=True)
    examples = pocket_examples(processor, a.search_questions)
    found = {}
    with remembered_features(model, len(examples)):
        for name, given in SEARCHES.items():
            if a.only not in name:
                continue
            file = a.journals / f"{name.replace(', ', '-').replace(' ', '-')}.journal"
            more = {"trials": a.trials, "storage": file, "progress": True}
            result = find_schedule(model, examples, **given, **more)
            print(f"{name}: {result.tokens}, score {result.accuracy:.3f}", flush=True)
            found[name] = result.schedule
    return found


def counts_of(options: dict[str, Any]) -> list[int]:
    """The tokens of each layer of the built-in model."""
    if "schedule" not in options:
        return [options.get("keep", TOKENS)] * 4
    return [round(TOKENS * share) for share in options["schedule"]["layers"]]


def against(config: Any, layers: Sequence[float], scores: str) -> list[Configuration]:
    """The simplest schedules of as many multiply-adds: constant ones just below and at or just
    above (for evenly spaced tokens one more or less changes which), and what keeps as many in all
    layers."""
    cost = partial(flops, config, text=TEXT)
    budget = cost([round(TOKENS * share) for share in layers])

    def least(make: Any) -> int:
        return next(k for k in range(1, TOKENS + 1) if cost(make(k)) >= budget)

    behind = least(lambda k: [TOKENS] + [k] * 3)
    options: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys((scores, "none")):
        who = "evenly spaced" if kind == "none" else kind
        for k in (behind - 1, behind):
            constant = {"layers": [1.0] + [round(k / TOKENS, 6)] * 3, "scores": kind}
            options[f"constant, {who}, {k} tokens"] = {"schedule": {**constant, "merge": False}}
    keep = least(lambda k: [k] * 4)
    options[f"on the way in, evenly spaced, {keep} tokens"] = {"method": "uniform", "keep": keep}
    return [Configuration(name, given) for name, given in options.items()]


def row(config: Any, c: Configuration, right: list[bool]) -> dict[str, Any]:
    tokens = counts_of(c.options)
    return {
        "name": c.name,
        "options": c.options,
        "tokens": tokens,
        "flops": round(flops(config, tokens, TEXT) / flops(config, [TOKENS] * 4, TEXT), 4),
        "accuracy": round(sum(right) / len(right), 4),
        "questions": len(right),
        "right": pack(right),
    }


def kept(results: Path, facts: dict[str, Any], asked: Sequence[Configuration]) -> Right:
    """The answers of these weights under these configurations that `results` has already."""
    if not results.is_file():
        return {}
    content = json.loads(results.read_text())
    if content["made"]["weights"] != facts["weights"]:
        return {}
    options = {c.name: c.options for c in asked}
    return {
        r["name"]: unpack(r["right"], r["questions"])
        for r in content["rows"]
        if r["options"] == options.get(r["name"])
    }


def made(a: argparse.Namespace) -> dict[str, Any]:
    """With what the answers were made."""
    command = f"python -m bench.search_pocket --only {a.only}".removesuffix(" --only ")
    return {**answers.made(command, a.workers), "search questions": a.search_questions}


def save(results: Path, content: dict[str, Any]) -> None:
    """Writes the answers whole or not at all."""
    results.parent.mkdir(parents=True, exist_ok=True)
    new = results.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(new, results)


def markdown(content: dict[str, Any]) -> str:
    """The table of results, and what they were made with."""
    rows = {r["name"]: r for r in content["rows"]}
    right = {name: unpack(r["right"], r["questions"]) for name, r in rows.items()}
    facts, full = content["made"], accuracy(right["full"])
    lines = [
        f"All 576 tokens: **{full.mean:.3f}** ± {full.half:.3f} on {len(right['full'])} held-out "
        "questions. ± is a 95 % interval, of a difference a paired one.",
        "",
        "| schedule | tokens in layers 0 to 3 | FLOPs | accuracy | found - this |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, others in content["rivals"].items():
        lines.append(_line(f"**{name}**", rows[name], accuracy(right[name]), ""))
        for other in others:
            gain = difference(right[name], right[other])
            signed = f"{gain.mean:+.3f} ± {gain.half:.3f}"
            lines.append(_line(other, rows[other], accuracy(right[other]), signed))
    lines += [
        "",
        f"`{facts['command']}`, then `python -m bench.tables`: searched on "
        f"{facts['search questions']} other questions; {facts['machine']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, commit {facts['commit']}, weights "
        f"{facts['weights']}.",
    ]
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any], estimate: Any, gain: str) -> str:
    tokens = ", ".join(map(str, row["tokens"]))
    return (
        f"| {name} | {tokens} | {row['flops']:.3f} | {estimate.mean:.3f} ± {estimate.half:.3f} | "
        f"{gain} |"
    )


def tables(results: Path = RESULTS) -> str:
    """The table of the answers kept."""
    content = json.loads(results.read_text())
    lacking = [r["name"] for r in content["rows"] if r["questions"] < ENOUGH]
    if lacking:
        raise ValueError(f"{results} must have {ENOUGH} answers everywhere, lacks {lacking}")
    return markdown(content)


if __name__ == "__main__":
    main()
