"""VLMEvalKit with a model that attach() has been at.

python -m restore_ext.integrations.vlmevalkit NAME=VALUE ... [options] [options of its run.py]

NAME=VALUE           of the model (pretrained=..., dtype=..., system_prompt=...) and of its
                     reduction (method=..., keep=..., restore=...), see docs/evaluation.md
--model NAME         what VLMEvalKit calls the model and its folder of results
--letter-prompt      ask for the letter of an answer, as LLaVA does, where there are choices
--vlmevalkit FOLDER  the folder of run.py, if it is not beside the package
"""

import argparse
import ast
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from restore_ext.cli.errors import UserError
from restore_ext.integrations.arguments import Arguments, read
from restore_ext.text import one_line

INSTALL = "git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit"


def main(argv: Sequence[str]) -> int:
    """Runs VLMEvalKit's run.py on our model; 2 after a one-line error on stderr."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        launch(argv)
    except (UserError, TypeError, ValueError, NotImplementedError) as error:
        print(f"vlmevalkit: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def launch(argv: Sequence[str]) -> None:
    """raises  TypeError, ValueError, UserError: naming the argument; from the loading of the model
    too, which run.py itself only logs
    """
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    arguments = read(dict(map(_named, words)))
    own, others = _options().parse_known_args(argv[len(words) :])
    run = _find_run(own.vlmevalkit)
    name = own.model or label(arguments)
    build = Build(arguments, own.letter_prompt)
    _register(name, build)
    before, sys.argv = sys.argv, [str(run), "--model", name, *others]
    try:
        runpy.run_path(str(run), run_name="__main__")
    finally:
        sys.argv = before
    if build.error is not None:
        raise build.error


class Build:
    """Makes the model when VLMEvalKit asks for it, once the process has been given its GPUs."""

    def __init__(self, arguments: Arguments, letter_prompt: bool) -> None:
        self.arguments = arguments
        self.letter_prompt = letter_prompt
        self.error: Exception | None = None

    def __call__(self, **_: Any) -> Any:
        """VLMEvalKit has options of its own for some names, use_vllm among them; none is ours."""
        from restore_ext.integrations.vlmevalkit.model import RestoreExt

        try:
            return RestoreExt(self.arguments, self.letter_prompt)
        except Exception as error:
            self.error = error
            raise


def label(arguments: Arguments) -> str:
    """A name for results."""
    parts = [Path(arguments.pretrained).name]
    reduction = arguments.reduction
    if reduction is None:
        parts.append("all")
    else:
        parts += [str(reduction[n]) for n in ("method", "keep", "keep_ratio") if n in reduction]
        parts.append("restore" if reduction.get("restore", True) else "plain")
    return "restore_ext-" + "-".join(parts)


def _register(name: str, build: Callable[[], Any]) -> None:
    from vlmeval.config import supported_VLM

    supported_VLM[name] = build


def _named(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"arguments of the model must be NAME=VALUE, got {word}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--letter-prompt", action="store_true")
    parser.add_argument("--vlmevalkit", type=Path)
    return parser


def _find_run(folder: Path | None) -> Path:
    """The run.py of a source tree, which is how VLMEvalKit is installed."""
    spec = find_spec("vlmeval")
    if spec is None or spec.origin is None:
        raise UserError(f"vlmevalkit needs vlmeval: {INSTALL}")
    run = (folder or Path(spec.origin).parent.parent) / "run.py"
    if not run.is_file():
        raise UserError(
            f"--vlmevalkit must be the folder of VLMEvalKit's run.py: there is none in {run.parent}"
        )
    return run
