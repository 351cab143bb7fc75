"""`restore-ext demo`: the built-in model answers with all tokens, and with few in two ways."""

import argparse
from pathlib import Path

from PIL import Image

import restore_ext
from restore_ext import picture
from restore_ext.cli.errors import UserError, check_reduction, open_image
from restore_ext.cli.load import encode_prompt, load, quiet
from restore_ext.cli.measure import Outcome, Task, table
from restore_ext.methods import find_card, name_of
from restore_ext.pocket import POCKET_NAME, held_out
from restore_ext.text import one_line

QUESTION = "how many objects ?"  # of a picture that came without one


def demo(arguments: argparse.Namespace) -> None:
    """Prints the table and writes the picture."""
    method = arguments.method
    keep = check_reduction(method, arguments.keep, arguments.repeats, arguments.schedule)
    what = name_of(method, keep, arguments.schedule)
    image, question, truth = _scene(arguments)
    quiet()
    model, processor = load(POCKET_NAME, arguments.device, arguments.dtype)
    inputs = encode_prompt(POCKET_NAME, processor, image, question, model)
    task = Task(model, processor, inputs, max_new_tokens=1, repeats=arguments.repeats)
    outcomes = [task.answer("all tokens")]
    ways = [(False, f"{what} plain"), (True, f"{what} + RESTORE")]
    for restore, label in ways[: 1 + find_card(method).restores]:
        try:
            handle = restore_ext.attach(
                model,
                method=method,
                keep=keep,
                restore=restore,
                backend=arguments.backend,
                schedule=arguments.schedule,
                min_visual_tokens=arguments.min_visual_tokens,
            )
        except ValueError as error:
            raise UserError(one_line(error)) from error
        with handle:
            outcomes.append(task.answer(label, handle))
    print(f"question  {question}")
    if truth:
        print(f"truth     {truth}")
    print(f"\n{table(outcomes)}\n")
    _write(arguments.output, image, question, truth, outcomes)


def _scene(arguments: argparse.Namespace) -> tuple[Image.Image, str, str | None]:
    """The picture, the question, and the answer where it is known."""
    if arguments.image is not None:
        return open_image(arguments.image), arguments.question or QUESTION, None
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, got {arguments.seed}")
    scene = held_out(arguments.seed)
    if arguments.question is not None:
        return scene.image, arguments.question, None
    return scene.image, scene.question.text, scene.question.answer


def _write(
    file: str, image: Image.Image, question: str, truth: str | None, outcomes: list[Outcome]
) -> None:
    heading = question if truth is None else f"{question}   ({truth})"
    panels = [picture.Panel(f"{o.label}: {o.answer}", _note(o), o.reduction) for o in outcomes]
    try:
        picture.explain(image, heading, panels).save(Path(file))
    except (OSError, ValueError) as error:  # ValueError: no format of that name
        raise UserError(f"--output: {file} cannot be written: {one_line(error)}") from error
    print(f"picture   {file}")


def _note(outcome: Outcome) -> str:
    if outcome.reduction is None:
        return f"{outcome.tokens} visual tokens"
    kept = int(outcome.reduction.kept.sum())
    merged = int(outcome.reduction.merged.sum())
    if not merged:
        tokens = outcome.tokens
        where = " inside the model" if tokens.last_layer < tokens.first_layer else ""
        return f"{kept} kept, the rest dropped{where}"
    return f"{kept} kept; {merged} merged: a colour each, a dot where it stands"
