"""`restore-ext eval pocket`: the accuracy table of the built-in model."""

import argparse

from restore_ext.cli.errors import UserError
from restore_ext.cli.load import quiet
from restore_ext.pocket import load_pocket
from restore_ext.pocket.eval import Right, accuracy, add, answer, configurations, plan
from restore_ext.pocket.table import markdown


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints every configuration's accuracy, then the tables."""
    from tqdm import tqdm

    if arguments.questions < 1:
        raise UserError(f"--questions must be at least 1, got {arguments.questions}")
    chosen = [c for c in configurations() if arguments.only in c.name]
    if not chosen:
        raise UserError(f"--only: no configuration has {arguments.only!r} in its name")
    quiet()
    model, processor = load_pocket()
    right: Right = {}
    with tqdm(total=arguments.questions, unit="question") as bar:
        for batch in plan(arguments.questions, chosen, right):
            add(right, batch, answer(model, processor, batch))
            bar.update(batch.stop - batch.start)
    for name, answers in right.items():
        estimate = accuracy(answers)
        print(f"{name:<36} {estimate.mean:.3f} ± {estimate.half:.3f}")
    print(f"\n{markdown(right)}")
