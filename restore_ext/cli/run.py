"""`restore-ext run`: any supported checkpoint answers about one picture on few visual tokens."""

import argparse

import restore_ext
from restore_ext.cli.errors import UserError, check_reduction, open_image
from restore_ext.cli.load import encode_prompt, load, quiet
from restore_ext.cli.measure import Outcome, Task, table
from restore_ext.methods import find_card, name_of
from restore_ext.text import one_line

NEW_TOKENS = 64  # where neither the user nor the checkpoint says


def run(arguments: argparse.Namespace) -> None:
    """Prints the answer and the table."""
    keep = check_reduction(arguments.method, arguments.keep, arguments.repeats, arguments.schedule)
    new_tokens = arguments.max_new_tokens
    if new_tokens is not None and new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {new_tokens}")
    image = open_image(arguments.image)
    quiet()
    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    inputs = encode_prompt(arguments.model, processor, image, arguments.prompt, model)
    limit = new_tokens or model.generation_config.max_new_tokens or NEW_TOKENS
    task = Task(model, processor, inputs, limit, arguments.repeats)
    outcomes = [task.answer("all tokens")] if arguments.compare else []
    plain = arguments.no_restore or not find_card(arguments.method).restores
    ways = [False] if plain else [False, True] if arguments.compare else [True]
    outcomes += [_reduced(task, arguments, keep, restore) for restore in ways]
    print(f"{outcomes[-1].answer}\n\n{table(outcomes)}")


def _reduced(task: Task, arguments: argparse.Namespace, keep: int | None, restore: bool) -> Outcome:
    what = name_of(arguments.method, keep, arguments.schedule)
    label = f"{what} + RESTORE" if restore else f"{what} plain"
    try:
        handle = restore_ext.attach(
            task.model,
            method=arguments.method,
            keep=keep,
            restore=restore,
            backend=arguments.backend,
            schedule=arguments.schedule,
            min_visual_tokens=arguments.min_visual_tokens,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"--model: {arguments.model}: {one_line(error)}") from error
    with handle:
        return task.answer(label, handle)
