"""The commands of restore-ext and their options. Nothing heavy is imported to show --help."""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from restore_ext.methods import list_methods
from restore_ext.reduce import DEFAULT_KEEP, DEFAULT_METHOD

METHODS = f"how tokens are picked (see restore-ext methods): {', '.join(list_methods())}"
BACKENDS = ("op", "mask")
DTYPES = ("float32", "bfloat16", "float16")
CLOCKS = ("wall", "thread")
BASELINES = "random and downsample are there in any case"
# --min-visual-tokens of what answers: from here on a reduction paid on the largest model measured,
# by docs/bench.md (restore-ext bench guard). What compares or looks inside spares nothing.
GUARD = 16
RANDOM = "random"  # the name of a model that is none


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
    add_reduction(parser, GUARD)
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
    kinds = parser.add_subparsers(required=True, dest="model", metavar="WHAT")
    pocket = kinds.add_parser(
        "pocket",
        help="the built-in model on drawn scenes",
        description="How many held-out questions the built-in model answers right. " + _NAMES,
    )
    _add_questions(pocket, 256, "scenes, with a question each")
    about = "ask every configuration (hours for 2048 questions), not only the main ones"
    pocket.add_argument("--all", action="store_true", help=about)
    about = "keep the answers there; a later run with it asks only what is missing"
    pocket.add_argument("--output", metavar="FILE", help=about)
    ocr = kinds.add_parser(
        "ocr",
        help="a reader on rendered lines of text",
        description="How many lines of text the reader of docs/ocr.md reads. " + _NAMES,
    )
    _add_questions(ocr, 512, "lines")


_NAMES = "Configurations are named METHOD/TOKENS/WAY; full is all tokens."


def _add_questions(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument("--questions", type=positive, default=default, help=what)
    about = "configurations whose name has this in it, for example divprune/64 (see --list)"
    parser.add_argument("--only", default="", help=about)
    parser.add_argument("--list", action="store_true", help="print the names, and do nothing")


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


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a hub id, a folder, or pocket")
    add_place(parser)
    add_reduction(parser, GUARD)
    parser.add_argument("--no-restore", action="store_true", help="prune by the method alone")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    remote = "fetch images from http and https addresses too, whatever the server can reach"
    parser.add_argument("--allow-remote-images", action="store_true", help=remote)
    for name, default, about in (
        ("images", 8, "images in a request"),
        ("image-bytes", 20 << 20, "bytes of an image, as it is stored"),
        ("image-pixels", 40_000_000, "pixels of an image, once decoded"),
        ("requests", 64, "requests at a time, waiting ones included; others get status 503"),
    ):
        parser.add_argument(f"--max-{name}", type=int, default=default, help=f"most {about}")
    patience = "how long requests may go on once the server is told to stop"
    parser.add_argument("--shutdown-seconds", type=int, default=30, help=patience)


def _bench(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, dest="kind", metavar="WHAT")
    for name, about, add_options in (
        ("model", "time to the first token, time a token, memory, at batch sizes", _bench_model),
        ("methods", "what each reduction takes, beside the prefill it saves", _bench_methods),
        ("ops", "the operators beside plain torch", _bench_ops),
        ("guard", "the visual tokens from which on a reduction pays", _bench_guard),
    ):
        kind = kinds.add_parser(name, help=about, description=about)
        add_options(kind)
        kind.add_argument("--rounds", type=positive, default=7, help="in which all take a turn")
        kind.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
        about = "wall, or the thread's own time on one CPU thread, which neighbours do not disturb"
        kind.add_argument("--clock", choices=CLOCKS, default="wall", help=about)
        kind.add_argument("--output", metavar="DIR", help="write CSV, Markdown and a plot there")


def _bench_model(parser: argparse.ArgumentParser) -> None:
    _add_subject(parser)
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHOD,
        help=f"joined by commas; {BASELINES}",
    )
    parser.add_argument("--batch", type=positives, default=[1, 4], help="rows, joined by commas")
    about = "requests at once, a thread each on the one model, joined by commas"
    parser.add_argument("--concurrency", type=positives, default=[1], help=about)
    about = "tokens to decode after the first"
    parser.add_argument("--new-tokens", type=not_negative, default=16, help=about)


def _bench_methods(parser: argparse.ArgumentParser) -> None:
    _add_subject(parser)
    about = f"joined by commas, or all; {BASELINES}"
    parser.add_argument("--methods", default="all", help=about)


def _bench_ops(parser: argparse.ArgumentParser) -> None:
    add_place(parser)


def _bench_guard(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument("--layers", type=positive, default=8, help="of the language model")
    parser.add_argument("--hidden", type=positive, default=512, help="its width")
    about = "of the square picture in tokens, joined by commas"
    parser.add_argument("--sides", type=positives, default=[3, 4, 6, 8, 12, 16], help=about)
    parser.add_argument("--keep-ratio", type=share, default=1 / 9, help="the share that stays")
    parser.add_argument("--methods", default="uniform,divprune,vispruner", help="joined by commas")


def _add_subject(parser: argparse.ArgumentParser) -> None:
    """A model and one prompt for it."""
    add_model(parser, "pocket", f", or {RANDOM}: a LLaVA of random weights")
    about = f"of --model {RANDOM}: layers, width, and the side of its picture in tokens"
    parser.add_argument("--shape", type=positives, default=[8, 512, 24], help=about)
    parser.add_argument("--image", help="a picture; without it a scene is drawn")
    about = "of that scene; the built-in model's own is 96"
    parser.add_argument("--pixels", type=positive, default=672, help=about)
    parser.add_argument("--prompt", help="what to ask of it")
    about = "visual tokens to keep, of methods with a budget"
    parser.add_argument("--keep", type=positive, default=DEFAULT_KEEP, help=about)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="op", help="attention: our op, or torch"
    )


def _none(parser: argparse.ArgumentParser) -> None:
    """No options."""


def add_model(parser: argparse.ArgumentParser, default: str | None = None, more: str = "") -> None:
    """Which checkpoint, where and in what dtype; `more` names it can have."""
    about = f"a hub id, a folder, or pocket{more}"
    parser.add_argument("--model", required=default is None, default=default, help=about)
    add_place(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where a model runs, and in what dtype."""
    parser.add_argument("--device", default="cpu", help="as torch names it")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model")


def add_reduction(parser: argparse.ArgumentParser, least: int = 0) -> None:
    """Which method, its budget and the attention; `least` is the default of the guard."""
    parser.add_argument("--method", default=DEFAULT_METHOD, help=METHODS)
    about = f"visual tokens to keep, >= 1 (default: {DEFAULT_KEEP}, if the method takes a budget)"
    parser.add_argument("--keep", type=int, help=about)
    about = "cuts inside the model, see docs/inside.md; with --keep, behind the method's"
    parser.add_argument("--schedule", metavar="FILE", help=about)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="op", help="attention: our op, or torch"
    )
    about = "leave a prompt with fewer visual tokens than that as it is; 0: none"
    parser.add_argument("--min-visual-tokens", type=not_negative, default=least, help=about)


def typed(arguments: argparse.Namespace) -> str:
    """The command line, but for where the output goes."""
    words = list(arguments.words)
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return shlex.join(["restore-ext", *(w for w in words if not w.startswith("--output="))])


def not_negative(text: str) -> int:
    """The int >= 0 that an option was given."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """The int >= 1 that an option was given."""
    return _at_least(1, text)


def positives(text: str) -> list[int]:
    """The same, several joined by commas."""
    return [positive(part) for part in text.split(",")]


def share(text: str) -> float:
    """The number in (0, 1] that an option was given."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return value


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an int of at least {least}, got {text}")
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
    Command("serve", "an OpenAI-compatible server, reducing every request", "serve:serve", _serve),
    Command("bench", "what reduction costs and saves on this machine", "bench:bench", _bench),
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
