"""The restore-ext command. A command's own module is imported when it is called."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from restore_ext.cli.errors import DEFAULT_KEEP, UserError
from restore_ext.methods import cards, list_methods
from restore_ext.methods.catalogue import as_text
from restore_ext.reduce import DEFAULT_METHOD

METHODS = f"how tokens are picked (see restore-ext methods): {', '.join(list_methods())}"
INSTALL = 'pip install "transformers>=4.57.6,<6" accelerate pillow tqdm'
BACKENDS = ("op", "mask")
DTYPES = ("float32", "bfloat16", "float16")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse that says what is wrong in one line, and its defaults in the help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=Help, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after a one-line error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except UserError as error:
        said = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "restore_ext").split(".")[0]
        if package == "restore_ext":
            raise
        said = f"{arguments.command} needs {package}: {INSTALL}"
    print(f"restore-ext: error: {said}", file=sys.stderr)
    return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "config":
        from restore_ext.config import show_config

        show_config()
    elif arguments.command == "methods":
        print(as_text(cards()))
    elif arguments.command == "demo":
        from restore_ext.cli.demo import demo

        demo(arguments)
    elif arguments.command == "run":
        from restore_ext.cli.run import run

        run(arguments)
    else:
        from restore_ext.cli.evaluate import evaluate

        evaluate(arguments)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="restore-ext", description="Visual token reduction with RESTORE.")
    commands = parser.add_subparsers(dest="command", required=True)

    about = "the built-in model on one picture: all tokens, plain, RESTORE"
    demo = commands.add_parser("demo", help=about, description=about)
    demo.add_argument("--image", help="a picture; without it a scene is drawn")
    demo.add_argument("--question", help="one in the model's own words (pocket.WORDS)")
    _add_reduction(demo)
    demo.add_argument("--seed", type=int, default=0, help="which scene to draw, >= 0")
    demo.add_argument("--output", default="demo.png", help="the picture to write")
    demo.add_argument("--repeats", type=int, default=5, help="timings to take the median of")

    about = "any supported checkpoint on one picture and prompt"
    run = commands.add_parser("run", help=about, description=about)
    run.add_argument("--model", required=True, help="a hub id, a folder, or pocket")
    run.add_argument("--image", required=True, help="a file")
    run.add_argument("--prompt", required=True, help="what to ask of it")
    _add_reduction(run)
    run.add_argument("--device", default="cpu", help="as torch names it")
    run.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model")
    run.add_argument("--max-new-tokens", type=int, help="default: the model's own, or 64")
    run.add_argument("--no-restore", action="store_true", help="prune by the method alone")
    run.add_argument("--compare", action="store_true", help="also all tokens, and plain pruning")
    run.add_argument("--repeats", type=int, default=1, help="timings to take the median of")

    about = "accuracy on held-out questions"
    evaluation = commands.add_parser("eval", help=about, description=about)
    evaluation.add_argument("model", choices=["pocket"])
    evaluation.add_argument("--questions", type=int, default=2048)
    evaluation.add_argument("--only", default="", help="configurations whose name has this in it")

    about = "what the methods need and do, and what RESTORE means there"
    commands.add_parser("methods", help=about, description=about)
    commands.add_parser("config", help="facts about this build and this machine")
    return parser


def _add_reduction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default=DEFAULT_METHOD, help=METHODS)
    about = f"visual tokens to keep, >= 1 (default: {DEFAULT_KEEP}, if the method takes a budget)"
    parser.add_argument("--keep", type=int, help=about)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="op", help="attention: our op, or torch"
    )
