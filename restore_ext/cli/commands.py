"""The commands of restore-ext and their options. Nothing heavy is imported to show --help."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from restore_ext.cli.errors import DEFAULT_KEEP
from restore_ext.methods import list_methods
from restore_ext.reduce import DEFAULT_METHOD

METHODS = f"how tokens are picked (see restore-ext methods): {', '.join(list_methods())}"
BACKENDS = ("op", "mask")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Command:
    """What the user calls, and MODULE:FUNCTION of this package, which takes the arguments."""

    name: str
    about: str
    entry: str  # imported when the command is called
    add_options: Callable[[argparse.ArgumentParser], None]


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", help="a picture; without it a scene is drawn")
    parser.add_argument("--question", help="one in the model's own words (pocket.WORDS)")
    add_place(parser)
    add_reduction(parser)
    parser.add_argument("--seed", type=int, default=0, help="which scene to draw, >= 0")
    parser.add_argument("--output", default="demo.png", help="the picture to write")
    parser.add_argument("--repeats", type=int, default=5, help="timings to take the median of")


def _run(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", required=True, help="a file")
    parser.add_argument("--prompt", required=True, help="what to ask of it")
    add_reduction(parser)
    parser.add_argument("--max-new-tokens", type=int, help="default: the model's own, or 64")
    parser.add_argument("--no-restore", action="store_true", help="prune by the method alone")
    parser.add_argument("--compare", action="store_true", help="also all tokens, and plain pruning")
    parser.add_argument("--repeats", type=int, default=1, help="timings to take the median of")


def _diagnose(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", help="a file; without it pocket draws a scene")
    parser.add_argument("--prompt", help="what to ask of it; of a drawn scene its own question")
    add_reduction(parser)
    parser.add_argument("--output", default="diagnosis", help="the folder to write into")
    about = "tokens to decode at most (default: 8; pocket: 1, its answers are a word)"
    parser.add_argument("--new-tokens", type=int, help=about)
    parser.add_argument("--seed", type=int, default=0, help="pocket: which scene to draw, >= 0")
    parser.add_argument("--scenes", type=int, help="pocket: average over so many, from --seed on")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=["pocket"])
    parser.add_argument("--questions", type=int, default=2048)
    parser.add_argument("--only", default="", help="configurations whose name has this in it")


def _search(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    questions = "questions: JSON lines of image (relative to the file), prompt, answer"
    parser.add_argument("--data", help=f"{questions}; pocket has its own")
    parser.add_argument("--questions", type=int, help="the first so many (pocket: 256)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of an answer to --data")
    parser.add_argument("--algorithm", choices=("psigmoid", "gsearch"), default="psigmoid")
    parser.add_argument(
        "--budget", type=float, help="psigmoid: share of the FLOPs of all tokens (default: 0.5)"
    )
    parser.add_argument("--latency-ms", type=float, help="psigmoid, instead: of one prompt")
    parser.add_argument("--trials", type=int, default=40, help="psigmoid: curves to measure")
    parser.add_argument("--tolerance", type=float, default=0.0, help="gsearch: accuracy to lose")
    scores = ("attention", "raters", "lookahead", "none")
    parser.add_argument("--scores", choices=scores, default="attention", help="who rates tokens")
    parser.add_argument("--merge", action="store_true", help="merge what does not stay")
    parser.add_argument("--no-restore", action="store_true", help="attach with restore=False")
    parser.add_argument("--backend", choices=BACKENDS, default="op")
    parser.add_argument("--seed", type=int, default=0, help="of the optimisation")
    parser.add_argument("--output", default="schedule.json", help="the file to write")
    parser.add_argument("--storage", help="what was measured (default: OUTPUT.trials)")
    parser.add_argument("--resume", action="store_true", help="go on with the storage")


def _none(parser: argparse.ArgumentParser) -> None:
    """No options."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, where and in what dtype."""
    parser.add_argument("--model", required=True, help="a hub id, a folder, or pocket")
    add_place(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where a model runs, and in what dtype."""
    parser.add_argument("--device", default="cpu", help="as torch names it")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model")


def add_reduction(parser: argparse.ArgumentParser) -> None:
    """Which method, its budget and the attention."""
    parser.add_argument("--method", default=DEFAULT_METHOD, help=METHODS)
    about = f"visual tokens to keep, >= 1 (default: {DEFAULT_KEEP}, if the method takes a budget)"
    parser.add_argument("--keep", type=int, help=about)
    about = "cuts inside the model, see docs/inside.md; with --keep, behind the method's"
    parser.add_argument("--schedule", metavar="FILE", help=about)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="op", help="attention: our op, or torch"
    )
    about = "leave a prompt with fewer visual tokens than that as it is; 0: none"
    parser.add_argument("--min-visual-tokens", type=not_negative, default=0, help=about)


def not_negative(text: str) -> int:
    """The int >= 0 that an option was given."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an int of at least 0, got {text}")
    return int(text)


COMMANDS = (
    Command(
        "demo", "the built-in model on one picture: all tokens, plain, RESTORE", "demo:demo", _demo
    ),
    Command("run", "any supported checkpoint on one picture and prompt", "run:run", _run),
    Command(
        "diagnose",
        "attention on visual tokens layer by layer, states and words, beside the full model's",
        "diagnose:diagnose",
        _diagnose,
    ),
    Command("eval", "accuracy on held-out questions", "evaluate:evaluate", _eval),
    Command("search", "how many tokens each layer needs: a --schedule", "search:search", _search),
    Command(
        "methods",
        "what the methods need and do, and what RESTORE means there",
        "about:methods",
        _none,
    ),
    Command("config", "facts about this build and this machine", "about:config", _none),
)
