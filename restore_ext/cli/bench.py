"""`restore-ext bench`: what reduction costs and saves on this machine."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from restore_ext.bench import facts, guard, ops, prefill, serving
from restore_ext.bench.random_llava import Shape, build
from restore_ext.bench.random_llava import prompt as random_prompt
from restore_ext.bench.rounds import clock_of
from restore_ext.bench.table import Column, Row, bars, markdown, said_of, text, write_csv
from restore_ext.bench.ways import ways_of
from restore_ext.cli.commands import RANDOM, typed
from restore_ext.cli.errors import UserError, open_image
from restore_ext.cli.load import check_room, encode_prompt, load, quiet, require_device
from restore_ext.methods import list_methods
from restore_ext.pocket import held_out, is_pocket
from restore_ext.text import one_line

BASELINES = ("random", "downsample")
QUESTION = "Describe the image."


@dataclass(frozen=True)
class Table:
    """What is printed and written: rows under columns, and a plot of one of them."""

    name: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    labels: tuple[str, ...]  # columns that name a row of the plot
    plot: str
    unit: str
    base: float | None = None  # where the plot has a line


def bench(arguments: argparse.Namespace) -> None:
    """Prints the tables of one kind, and writes them if asked."""
    _check(arguments)
    device = require_device(arguments.device)
    quiet()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    made = facts.made(device, arguments.clock)  # now: what runs is what was read now
    kinds = {"model": _model, "methods": _methods, "ops": _ops, "guard": _guard}
    subject, tables, said = kinds[arguments.kind](arguments)
    made = {"command": typed(arguments), "model": subject} | made
    tables = [replace(table, rows=[row | made for row in table.rows]) for table in tables]
    for table in tables:
        print(f"{text(table.rows, table.columns)}\n")
    print("\n".join([*said, said_of(tables[0].rows)]))
    if arguments.output is not None:
        _write(Path(arguments.output), tables, said)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.clock == "thread":
        several = max(getattr(arguments, "concurrency", [1])) > 1
        if arguments.threads != 1 or arguments.device != "cpu" or several:
            raise UserError("--clock thread needs --threads 1 and --device cpu, and no concurrency")
    if arguments.output is not None:
        if find_spec("matplotlib") is None:
            raise UserError("--output has a plot, which needs matplotlib: pip install matplotlib")
        try:
            Path(arguments.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: {arguments.output}: {one_line(error)}") from error
    for method in _asked(arguments):
        if method not in list_methods():
            raise UserError(f"--methods must be among {', '.join(list_methods())}, got {method}")
    if arguments.kind == "guard":
        _check_width("--hidden", arguments.hidden)
    elif getattr(arguments, "model", None) == RANDOM:
        if len(arguments.shape) != 3:
            raise UserError(f"--shape must be LAYERS,WIDTH,SIDE, got {arguments.shape}")
        _check_width("--shape", arguments.shape[1])


def _check_width(option: str, width: int) -> None:
    try:
        Shape.of(1, width, 1)
    except ValueError as error:
        raise UserError(f"{option}: {one_line(error)}") from error


def _asked(arguments: argparse.Namespace) -> list[str]:
    """The methods, by name."""
    named = getattr(arguments, "methods", "")
    if named == "all":
        return list_methods()
    return [name.strip() for name in named.split(",") if name.strip()]


def _model(arguments: argparse.Namespace) -> tuple[str, list[Table], list[str]]:
    subject, model, inputs = _subject(arguments)
    check_room(model, inputs, 1 + arguments.new_tokens)
    clock = clock_of(arguments.clock, model.device)
    attentions = serving.measure_attentions(model, inputs, arguments.rounds, clock)
    running = [row["attention"] for row in attentions if "ttft_ms" in row]
    methods = [*BASELINES, *_asked(arguments)]
    ways = ways_of(methods, arguments.keep, model, inputs, arguments.backend)
    measured = serving.Serving(
        model,
        inputs,
        ways,
        arguments.new_tokens,
        arguments.rounds,
        clock,
        fastest=running[0],
        hooked=next(name for name in running if name in ("sdpa", "eager")),
    )
    cells = len(arguments.batch) * len(arguments.concurrency)
    with closing(_bar(cells * len(ways) * (1 + arguments.rounds))) as bar:
        rows = list(measured.measure(arguments.batch, arguments.concurrency, bar.update))
    labels, shown = ("way", "batch", "concurrency"), ("ttft_ms", "ms to the first token")
    tables = [
        Table("model", rows, serving.COLUMNS, labels, *shown),
        Table("attention", attentions, serving.ATTENTION_COLUMNS, ("attention",), *shown),
    ]
    return subject, tables, [f"The unhooked model runs with its fastest attention, {running[0]}."]


def _methods(arguments: argparse.Namespace) -> tuple[str, list[Table], list[str]]:
    subject, model, inputs = _subject(arguments)
    methods = [*BASELINES, *_asked(arguments)]
    ways = ways_of(methods, arguments.keep, model, inputs, arguments.backend)
    with closing(_bar(len(ways) * (1 + arguments.rounds))) as bar:
        rows = prefill.measure_prefills(
            model,
            inputs,
            ways,
            arguments.rounds,
            clock_of(arguments.clock, model.device),
            bar.update,
        )
    table = Table("methods", rows, prefill.COLUMNS, ("way",), "speedup", "speed-up", 1.0)
    return subject, [table], []


def _ops(arguments: argparse.Namespace) -> tuple[str, list[Table], list[str]]:
    device = torch.device(arguments.device)
    with closing(_bar(len(ops.problems()))) as bar:
        rows = ops.measure_ops(
            arguments.device,
            getattr(torch, arguments.dtype),
            arguments.rounds,
            clock_of(arguments.clock, device),
            bar.update,
        )
    labels, unit = ("way", "problem"), "speed-up over plain torch"
    table = Table("ops", rows, ops.COLUMNS, labels, "speedup", unit, 1.0)
    return arguments.dtype, [table], []


def _guard(arguments: argparse.Namespace) -> tuple[str, list[Table], list[str]]:
    device = torch.device(arguments.device)
    methods = _asked(arguments)
    with closing(_bar(len(arguments.sides) * (1 + len(methods)) * (1 + arguments.rounds))) as bar:
        rows = guard.measure_guard(
            arguments.layers,
            arguments.hidden,
            arguments.sides,
            arguments.keep_ratio,
            methods,
            arguments.device,
            getattr(torch, arguments.dtype),
            arguments.rounds,
            clock_of(arguments.clock, device),
            bar.update,
        )
    said = [
        f"{way}: faster at no number measured."
        if least is None
        else f"{way}: faster from {least} visual tokens on (--min-visual-tokens {least})."
        for way, least in guard.break_evens(rows).items()
    ]
    table = Table("guard", rows, guard.COLUMNS, ("way", "before"), "speedup", "speed-up", 1.0)
    shape = Shape.of(arguments.layers, arguments.hidden, 1)
    return f"random LLaVA, {shape.layers} x {shape.hidden}", [table], said


def _subject(arguments: argparse.Namespace) -> tuple[str, Any, dict[str, torch.Tensor]]:
    """The model's name, the model and a prompt for it."""
    if arguments.model == RANDOM:
        shape, dtype = Shape.of(*arguments.shape), getattr(torch, arguments.dtype)
        given = shape, arguments.device, dtype
        return str(shape), build(*given), random_prompt(shape, 1, arguments.device, dtype)
    scene, pocket = held_out(0), is_pocket(arguments.model)
    image = scene.image if pocket else scene.image.resize((arguments.pixels, arguments.pixels))
    if arguments.image is not None:
        image = open_image(arguments.image)
    asked = arguments.prompt or (scene.question.text if pocket else QUESTION)
    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    inputs = encode_prompt(arguments.model, processor, image, asked, model)
    return Path(arguments.model).name, model, inputs


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="run", leave=False)


def _label(table: Table, row: Row) -> str:
    """What names a row of the plot: its columns, and numbers with what they count."""
    counts = {"batch": "batch {}", "concurrency": "{} at once", "before": "{} visual tokens"}
    return ", ".join(counts.get(k, "{}").format(row[k]) for k in table.labels)


def _write(folder: Path, tables: Sequence[Table], said: Sequence[str]) -> None:
    try:
        for table in tables:
            file = folder / table.name
            write_csv(file.with_suffix(".csv"), table.rows)
            parts = [markdown(table.rows, table.columns), *said, said_of(table.rows)]
            file.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
            title = f"{table.rows[0]['model']}, {table.rows[0]['machine']}"
            shown = {_label(table, row): row for row in table.rows}
            bars(file.with_suffix(".png"), shown, table.plot, title, table.unit, table.base)
    except OSError as error:
        raise UserError(f"--output: {folder}: {one_line(error)}") from error
    print(f"written   {folder}")
