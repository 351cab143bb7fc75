"""`restore-ext search`: looks for a schedule, and writes the file that --schedule takes."""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from restore_ext.cli.errors import UserError, open_image
from restore_ext.cli.load import encode_prompt, load, quiet, to_model
from restore_ext.pocket import is_pocket
from restore_ext.pocket.shared import remembered_features
from restore_ext.search import exact_match, find_schedule, first_token
from restore_ext.search.examples import DEFAULT_BATCH, pocket_examples
from restore_ext.search.find import require_limits
from restore_ext.search.found import Found
from restore_ext.search.score import Score
from restore_ext.text import one_line

DEFAULT_BUDGET = 0.5
DEFAULT_QUESTIONS = 256  # of the built-in model's
NEEDED = ("image", "prompt", "answer")


def search(arguments: argparse.Namespace) -> None:
    """Writes the schedule, and prints what it costs and brings."""
    import optuna  # noqa: F401 - if it is missing, that is said before a model is loaded

    a = arguments
    if a.algorithm == "psigmoid" and a.budget is a.latency_ms is None:
        a.budget = DEFAULT_BUDGET
    storage = _check(a)
    questions = None if a.data is None else list(_read(a.data))[: a.questions]
    quiet()
    model, processor = load(a.model, a.device, a.dtype)
    score: Score
    examples: list[tuple[dict[str, Any], Any]]
    if questions is None:
        score = first_token
        count = a.questions or DEFAULT_QUESTIONS
        own = pocket_examples(processor, count, DEFAULT_BATCH if a.latency_ms is None else 1)
        examples = [(to_model(inputs, model), answers) for inputs, answers in own]
    else:
        score = exact_match(processor, a.max_new_tokens)
        examples = [
            (encode_prompt(a.model, processor, open_image(i, "--data"), p, model), answer)
            for i, p, answer in questions
        ]
    # The tower's time counts where the clock decides.
    remembers = is_pocket(a.model) and a.latency_ms is None
    try:
        with remembered_features(model, len(examples)) if remembers else nullcontext():
            found = find_schedule(
                model,
                examples,
                score,
                algorithm=a.algorithm,
                budget=a.budget,
                latency_ms=a.latency_ms,
                trials=a.trials,
                tolerance=a.tolerance,
                scores=a.scores,
                merge=a.merge,
                options={"restore": not a.no_restore, "backend": a.backend},
                storage=storage,
                seed=a.seed,
                progress=True,
            )
    except KeyboardInterrupt as stop:
        raise UserError("stopped: the same command with --resume goes on") from stop
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise UserError(one_line(error)) from error
    try:
        found.save(a.output)
    except OSError as error:
        raise UserError(
            f"--output: {a.output} cannot be written: {one_line(error)}; --resume with another one "
            "measures nothing again"
        ) from error
    _say(found, a.output)


def _check(a: argparse.Namespace) -> Path:
    """The storage's path, after all that can be refused before a model is loaded."""
    if a.data is None and not is_pocket(a.model):
        raise UserError(
            f"--data must name a file with questions for --model {a.model}: a JSON object with "
            f"{', '.join(NEEDED)} a line; only pocket has its own"
        )
    for name in ("questions", "trials", "max_new_tokens"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            said = name.replace("_", "-")
            raise UserError(f"--{said} must be at least 1, got {getattr(a, name)}")
    try:
        require_limits(a.algorithm, a.budget, a.latency_ms, a.tolerance)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    storage = Path(a.storage or f"{a.output}.trials")
    for option, path in (("--output", Path(a.output)), ("--storage", storage)):
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"{option} must be a file in a folder that exists, got {path}")
    if storage.exists() and not a.resume:
        raise UserError(
            f"--storage: {storage} is there already: --resume goes on with it, or name another"
        )
    return storage


def _read(file: str) -> Iterator[tuple[str, str, str]]:
    """(image, prompt, answer) of each line; images are relative to the file."""
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data: {file} cannot be read: {one_line(error)}") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"--data: {file} has no questions")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except ValueError as error:
            raise UserError(f"--data: {file}, line {number} is not JSON: {error}") from error
        if not isinstance(said, dict) or any(not isinstance(said.get(n), str) for n in NEEDED):
            raise UserError(
                f"--data: {file}, line {number} must have texts {', '.join(NEEDED)}, got {line:.80}"
            )
        image = Path(file).parent / said["image"]
        if not image.is_file():
            raise UserError(f"--data: {file}, line {number}: there is no file {image}")
        yield str(image), said["prompt"], said["answer"]


def _say(found: Found, output: str) -> None:
    about = found.schedule["about"]
    rows = {
        "schedule": output,
        "tokens": " ".join(map(str, found.tokens)),
        "accuracy": f"{found.accuracy:.3f}, with all tokens {found.accuracy_whole:.3f}, "
        f"on {about['rows']} questions",
        "FLOPs": f"{found.flops:.1%} of those with all tokens",
        "KV bytes": f"{found.kv_bytes:.1%}",
        "measured": f"{found.trials} schedules",
    }
    for name, value in rows.items():
        print(f"{name:<10}{value}")
