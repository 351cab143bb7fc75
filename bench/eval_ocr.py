"""Measures what every way of reducing tokens costs the reader of restore_ext.ocr in lines read.

The answers are kept in bench/results/ocr_eval.json, line by line: the edit distance of each. The
tables of docs/ocr.md are made of them by python -m bench.tables.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import PIL
import torch
from tqdm import tqdm

from bench.machine import commit, machine
from restore_ext.ocr.eval import Errors, characters, configurations, evaluate
from restore_ext.ocr.reader import load_reader
from restore_ext.ocr.table import markdown

RESULTS = Path("bench/results/ocr_eval.json")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.eval_ocr", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--lines", type=int, default=512)
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args(argv)
    reader, began = load_reader(), commit()
    chosen, start = configurations(), time.process_time()
    wrong: Errors = {}
    with tqdm(total=len(chosen), unit="way") as bar:
        for name, errors in evaluate(reader, a.lines, chosen):
            if name:
                wrong[name] = errors
                bar.update()
    minutes = (time.process_time() - start) / 60
    facts = {
        "command": f"python -m bench.eval_ocr --lines {a.lines}",
        "weights": reader.fingerprint,
        "machine": f"{machine('cpu')}, {torch.get_num_threads()} threads, {minutes:.0f} min of CPU",
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "commit": began,
    }
    save(a.results, facts, characters(a.lines), wrong)
    print(f"{len(chosen)} ways, {minutes:.1f} min: {a.results}")


def save(results: Path, facts: dict[str, str], lengths: Sequence[int], wrong: Errors) -> None:
    rows = {name: pack(errors) for name, errors in wrong.items()}
    content = {"made": facts, "characters": pack(lengths), "errors": rows}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(content, indent=1) + "\n")


def pack(numbers: Sequence[int]) -> str:
    """Numbers below 62, a digit each."""
    return "".join(DIGITS[number] for number in numbers)


def unpack(text: str) -> list[int]:
    return [DIGITS.index(digit) for digit in text]


def tables(results: Path = RESULTS) -> str:
    """The tables of the answers kept, with what they were made with."""
    content = json.loads(results.read_text())
    wrong = {name: unpack(text) for name, text in content["errors"].items()}
    lacking = [c.name for c in configurations() if c.name not in wrong]
    if lacking:
        raise ValueError(f"{results} must have every configuration, lacks {lacking}")
    facts = content["made"]
    how = (
        f"`{facts['command']}`, then `python -m bench.tables`: {facts['machine']}, torch "
        f"{facts['torch']}, pillow {facts['pillow']}, commit {facts['commit']}, weights "
        f"{facts['weights']}."
    )
    return f"{markdown(wrong, unpack(content['characters']))}\n\n{how}"


if __name__ == "__main__":
    main()
