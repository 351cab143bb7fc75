"""The restore-ext command. A command's own module is imported when it is called."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from restore_ext import __version__
from restore_ext.cli.commands import COMMANDS
from restore_ext.cli.errors import UserError
from restore_ext.text import one_line

INSTALL = 'pip install "transformers>=4.57.6,<6" accelerate pillow tqdm matplotlib'
INSTALL_OF = {"optuna": 'pip install "optuna>=5,<6" tqdm', "jinja2": "pip install jinja2"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        said = super()._get_help_string(action)
        if said is not None and isinstance(action.default, list):  # as it is typed
            return said.replace("%(default)s", ",".join(map(str, action.default)))
        return said


class Parser(argparse.ArgumentParser):
    """An argparse that says what is wrong in one line, and its defaults in the help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=Help, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 after a one-line error on stderr, or, as a shell has it, 130
    if interrupted and 141 if nobody reads the output any more."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = command_parser().parse_args(words)
    arguments.words = words  # as they were typed
    command = arguments.command
    try:
        module, function = command.entry.split(":")
        getattr(import_module(f"restore_ext.cli.{module}"), function)(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 130  # as a shell has it: 128 + SIGINT
    except UserError as error:
        said = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "restore_ext").split(".")[0]
        if package == "restore_ext":
            raise
        said = f"{command.name} needs {package}: {INSTALL_OF.get(package, INSTALL)}"
    except ImportError as error:  # one that is too old, or lacks what it needs itself
        said = f"{command.name}: {one_line(error)}"
    print(f"restore-ext: error: {said}", file=sys.stderr)
    return 2


def command_parser() -> Parser:
    """Of every command and its options."""
    parser = Parser(prog="restore-ext", description="Visual token reduction with RESTORE.")
    parser.add_argument("--version", action="version", version=f"restore_ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.about, description=command.about)
        command.add_options(own)
        own.set_defaults(command=command)
    return parser
