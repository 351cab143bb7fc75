"""`restore-ext eval`: accuracy of every way of reducing tokens, with intervals."""

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

from restore_ext.cli.errors import UserError
from restore_ext.cli.load import quiet
from restore_ext.pocket.eval import Estimate

Named = TypeVar("Named")
Name = Callable[[Named], str]


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints every configuration's accuracy, then the tables."""
    if arguments.questions is not None and arguments.questions < 1:
        raise UserError(f"--questions must be at least 1, got {arguments.questions}")
    {"pocket": pocket, "ocr": ocr}[arguments.model](arguments)


def pocket(arguments: argparse.Namespace) -> None:
    """The built-in model on held-out questions."""
    from tqdm import tqdm

    from restore_ext.pocket import load_pocket
    from restore_ext.pocket.eval import Right, accuracy, add, answer, configurations, plan
    from restore_ext.pocket.table import markdown

    questions = arguments.questions or 2048
    chosen = _chosen(configurations(), arguments.only, lambda c: c.name)
    quiet()
    model, processor = load_pocket()
    right: Right = {}
    with tqdm(total=questions, unit="question") as bar:
        for batch in plan(questions, chosen, right):
            add(right, batch, answer(model, processor, batch))
            bar.update(batch.stop - batch.start)
    for name, answers in right.items():
        _say(name, accuracy(answers))
    print(f"\n{markdown(right)}")


def ocr(arguments: argparse.Namespace) -> None:
    """The reader of smart-kh-ocr on rendered lines."""
    from tqdm import tqdm

    from restore_ext.ocr.eval import (
        Errors,
        characters,
        configurations,
        error_rate,
        evaluate,
        exact,
    )
    from restore_ext.ocr.reader import load_reader
    from restore_ext.ocr.table import markdown

    lines = arguments.questions or 512
    chosen = _chosen(configurations(), arguments.only, lambda c: c.name)
    try:
        reader = load_reader()
        lengths = characters(lines)
    except (ModuleNotFoundError, OSError) as error:
        raise UserError(f"eval ocr: {error}") from error
    wrong: Errors = {}
    with tqdm(total=len(chosen), unit="way") as bar:
        for name, errors in evaluate(reader, lines, chosen):
            if name:
                wrong[name] = errors
                bar.update()
    for name, errors in wrong.items():
        _say(name, exact(errors), f"  CER {error_rate(errors, lengths).mean:.4f}")
    print(f"\n{markdown(wrong, lengths)}")


def _chosen(configurations: Sequence[Named], only: str, name: Name[Named]) -> list[Named]:
    chosen = [c for c in configurations if only in name(c)]
    if not chosen:
        raise UserError(f"--only: no configuration has {only!r} in its name")
    return chosen


def _say(name: str, estimate: Estimate, more: str = "") -> None:
    print(f"{name:<36} {estimate.mean:.3f} ± {estimate.half:.3f}{more}")
