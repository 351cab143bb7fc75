"""Answers of an evaluation in a file, question by question, so that more of them only add to it.

Answers of other weights, or under options that have changed, are not mixed: they are asked anew.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from restore_ext.bench.facts import commit, machine
from restore_ext.pocket.eval import Batch, Configuration, Right, add, configurations, plan
from restore_ext.pocket.model import FOLDER

Row = dict[str, Any]


def evaluate(
    chosen: Sequence[Configuration],
    questions: int,
    answers: Callable[[Sequence[Batch]], Iterable[Right]],
    file: Path | None,
    facts: dict[str, Any],
    *,
    batch: int = 64,
    fresh: bool = False,
    done: Callable[[int, int], object] = lambda now, total: None,
) -> Right:
    """What was right of questions 0..questions-1 under each configuration, and maybe of more.

    answers  of batches, in their order
    file     where answers are kept after every batch, and what is there already is not asked again
    facts    with what they are made, see made()
    fresh    forget what is there
    done     called with the questions answered now and those that there were to ask
    """
    rows = {} if fresh or file is None else kept(file)
    right = {name: unpack(row["right"], row["questions"]) for name, row in rows.items()}
    now = commit()  # what runs is what was read when this began
    batches = [b for b in plan(questions, chosen, right, batch) if b.todo]
    total = sum(b.stop - b.start for b in batches)
    for part, found in zip(batches, answers(batches), strict=True):
        add(right, part, found)
        if file is not None:
            for c in part.todo:
                rows[c.name] = row(c, right[c.name], now, rows.get(c.name))
            save(file, facts, rows)
        done(part.stop - part.start, total)
    return {c.name: right[c.name] for c in chosen}


def kept(results: Path) -> dict[str, Row]:
    """The rows in `results` that are these weights' answers under today's options of that name.

    Raises ValueError if the file is not one of answers.
    """
    if not results.is_file():
        return {}
    options = {c.name: c.options for c in configurations()}
    try:
        content = json.loads(results.read_text())
        weights = content["made"]["weights"]
        rows = {n: row for n, row in content["rows"].items() if row["options"] == options.get(n)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{results} must be a file of answers, is not one") from error
    if weights != fingerprint():
        print(f"{results} is of other weights: starting anew")
        return {}
    return rows


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
    new = results.with_name(results.name + ".new")
    new.write_text(json.dumps({"made": facts, "rows": rows}, indent=1) + "\n")
    os.replace(new, results)


def made(command: str, processes: int) -> dict[str, Any]:
    """With what the answers are made."""
    import transformers

    return {
        "command": command,
        "weights": fingerprint(),
        "machine": f"{machine('cpu')}, {processes} process{'es' * (processes != 1)}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


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
