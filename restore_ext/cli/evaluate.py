"""`restore-ext eval`: accuracy of every way of reducing tokens, with intervals."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from restore_ext.cli.commands import typed
from restore_ext.cli.errors import UserError
from restore_ext.cli.load import quiet
from restore_ext.pocket.eval import Estimate
from restore_ext.text import one_line

Named = TypeVar("Named")
Name = Callable[[Named], str]


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints every configuration's accuracy, then the tables."""
    {"pocket": pocket, "ocr": ocr}[arguments.model](arguments)


def pocket(arguments: argparse.Namespace) -> None:
    """The built-in model on held-out questions."""
    from tqdm import tqdm

    from restore_ext.pocket import answers, load_pocket
    from restore_ext.pocket.eval import accuracy, answer, configurations, main_configurations
    from restore_ext.pocket.table import markdown

    some = configurations() if arguments.all or arguments.only else main_configurations()
    chosen = _chosen(some, arguments, lambda c: c.name)
    if arguments.list:
        return
    file = None if arguments.output is None else Path(arguments.output)
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UserError(f"--output must be a file in a folder that exists, got {file}")
    questions = arguments.questions
    facts = answers.made(typed(arguments), 1)
    quiet()
    asked = partial(map, partial(answer, *load_pocket()))
    with tqdm(unit="question") as bar:

        def done(now: int, total: int) -> None:
            bar.total = total
            bar.update(now)

        try:
            right = answers.evaluate(chosen, questions, asked, file, facts, done=done)
        except (OSError, ValueError) as error:
            raise UserError(f"--output: {one_line(error)}") from error
        except KeyboardInterrupt:
            if file is not None:
                print("stopped: the same command goes on", file=sys.stderr)
            raise
    right = {name: found[:questions] for name, found in right.items()}
    for name, found in right.items():
        _say(name, accuracy(found))
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

    lines = arguments.questions
    chosen = _chosen(configurations(), arguments, lambda c: c.name)
    if arguments.list:
        return
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


def _chosen(
    configurations: Sequence[Named], arguments: argparse.Namespace, name: Name[Named]
) -> list[Named]:
    """Those that were asked for; printed, if that is what was asked."""
    chosen = [c for c in configurations if arguments.only in name(c)]
    if not chosen:
        raise UserError(
            f"--only: no configuration has {arguments.only!r} in its name: "
            f"restore-ext eval {arguments.model} --list has the names"
        )
    if arguments.list:
        print("\n".join(map(name, chosen)))
    return chosen


def _say(name: str, estimate: Estimate, more: str = "") -> None:
    print(f"{name:<36} {estimate.mean:.3f} ± {estimate.half:.3f}{more}")
