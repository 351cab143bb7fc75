"""What an engine without the distance term loses: the vLLM plug-in calibrates by size alone.

    python -m bench.distance_term --questions 512

Under transformers, with the options of attach() that the plug-in has, and its defaults: accuracy on
the pocket model's held-out questions, and how often the word is that of attach()'s defaults.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

import restore_ext
from restore_ext.cli.load import quiet
from restore_ext.pocket import encode, held_out, load_pocket
from restore_ext.pocket.eval import accuracy, difference, estimate, first_words
from restore_ext.pocket.scenes import ID
from restore_ext.pocket.shared import shared_work
from restore_ext.pocket.table import as_table, signed

METHODS = ("divprune", "vispruner")
BUDGETS = (64, 16)
WAYS: dict[str, dict[str, Any]] = {
    "size": {"calibrate": "size"},
    "size + distance": {"calibrate": "size+distance"},
}
BATCH = 32


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distance_term", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--questions", type=int, default=512)
    a = parser.parse_args(argv)
    quiet()
    model, processor = load_pocket()
    words: dict[str, list[int]] = {}
    wanted: list[int] = []
    for first in tqdm(range(0, a.questions, BATCH), unit="batch"):
        scenes = [held_out(i) for i in range(first, min(first + BATCH, a.questions))]
        wanted += [ID[scene.question.answer] for scene in scenes]
        questions = [scene.question.text for scene in scenes]
        inputs = encode(processor, [scene.image for scene in scenes], questions)
        with torch.no_grad(), shared_work(model):
            words.setdefault("full", []).extend(first_words(model, inputs))
            for name, options in configurations().items():
                with restore_ext.attach(model, **options):
                    words.setdefault(name, []).extend(first_words(model, inputs))
    print(f"All 576 visual tokens: {accuracy(right(words['full'], wanted)).mean:.3f}\n")
    print(table(words, wanted))


def configurations() -> dict[str, dict[str, Any]]:
    return {
        f"{method}/{keep}/{way}": {"method": method, "keep": keep, **options}
        for keep in BUDGETS
        for method in METHODS
        for way, options in WAYS.items()
    }


def right(words: Sequence[int], wanted: Sequence[int]) -> list[bool]:
    return [w == a for w, a in zip(words, wanted, strict=True)]


def table(words: dict[str, list[int]], wanted: Sequence[int]) -> str:
    lines = []
    for keep in BUDGETS:
        for method in METHODS:
            size, both = (words[f"{method}/{keep}/{way}"] for way in WAYS)
            scores = [right(x, wanted) for x in (size, both)]
            same = estimate([float(r) for r in right(size, both)])
            means = [f"{accuracy(score).mean:.3f}" for score in scores]
            lost = signed(difference(scores[1], scores[0]))
            lines.append([str(keep), method, *means, lost, f"{same.mean:.3f} ± {same.half:.3f}"])
    titles = ["tokens", "method", *WAYS, "distance adds", "same word"]
    return as_table(titles, lines)


if __name__ == "__main__":
    main()
