"""`restore-ext diagnose`: what a reduction does to a model's attention, states and words."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401  first: where it is missing, that is said before any work is done
from PIL import Image

import restore_ext
from restore_ext.bench import facts
from restore_ext.cli.commands import typed
from restore_ext.cli.errors import UserError, check_reduction, open_image
from restore_ext.cli.load import check_room, encode_prompts, load, quiet, require_device
from restore_ext.hf.diagnosis import Diagnosis, join, table
from restore_ext.hf.diagnosis.maps import (
    TITLES,
    as_picture,
    draw_attention,
    draw_tokens,
    find_bases,
)
from restore_ext.hf.diagnosis.plots import plot_distances, plot_shares
from restore_ext.hf.diagnosis.run import DEFAULT_NEW_TOKENS
from restore_ext.pocket import held_out, is_pocket
from restore_ext.text import aligned, one_line

BATCH = 8  # scenes at a time
GREY = ([0.5] * 3, [0.5] * 3)  # how pictures are normalised where the processor does not say
Asked = list[tuple[Image.Image, str]]


def diagnose(arguments: argparse.Namespace) -> None:
    """Prints the table and writes numbers, plots and heat maps into the folder."""
    keep = check_reduction(arguments.method, arguments.keep, 1, arguments.schedule)
    pocket = is_pocket(arguments.model)
    asked = _asked(arguments, pocket)
    new_tokens = arguments.new_tokens
    if new_tokens is None:
        new_tokens = 1 if pocket else DEFAULT_NEW_TOKENS
    elif new_tokens < 1:
        raise UserError(f"--new-tokens must be at least 1, got {new_tokens}")
    device = require_device(arguments.device)
    folder = _folder(arguments.output)
    quiet()
    # Now: what runs is what was read now.
    made = {"command": typed(arguments), **facts.made(device, "wall")}
    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    reduction = {
        "method": arguments.method,
        "keep": keep,
        "schedule": arguments.schedule,
        "min_visual_tokens": arguments.min_visual_tokens,
        "backend": arguments.backend,
    }
    batches = []
    for first in range(0, len(asked), BATCH):
        pictures, questions = zip(*asked[first : first + BATCH], strict=True)
        batches.append(encode_prompts(arguments.model, processor, pictures, questions, model))
        check_room(model, batches[-1], new_tokens)
    parts = []
    for inputs in _with_progress(batches):
        try:
            parts.append(restore_ext.diagnose(model, inputs, new_tokens=new_tokens, **reduction))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"--model: {arguments.model}: {one_line(error)}") from error
    summary = {"model": arguments.model, "made": made, **join(parts).summary()}
    _say(asked, processor, parts[0], summary)
    try:
        (folder / "diagnosis.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
        print(f"numbers    {folder / 'diagnosis.json'}")
        for name, plot in (("shares", plot_shares), ("distances", plot_distances)):
            plot(summary).savefig(folder / f"{name}.png")
            print(f"plot       {folder / name}.png")
        _draw(folder, model, processor, parts[0], batches[0], asked[0])
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written: {one_line(error)}") from error


def _asked(arguments: argparse.Namespace, pocket: bool) -> Asked:
    """The pictures and what is asked of each."""
    if arguments.image is not None:
        if arguments.scenes is not None:
            raise UserError("--scenes must not be given with --image: scenes are drawn")
        if arguments.prompt is None:
            raise UserError("--prompt must be given with --image")
        return [(open_image(arguments.image), arguments.prompt)]
    if not pocket:
        raise UserError(f"--image must be given for {arguments.model}; only pocket draws its own")
    scenes = 1 if arguments.scenes is None else arguments.scenes
    if scenes < 1:
        raise UserError(f"--scenes must be at least 1, got {scenes}")
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, got {arguments.seed}")
    drawn = [held_out(arguments.seed + number) for number in range(scenes)]
    return [(scene.image, arguments.prompt or scene.question.text) for scene in drawn]


def _folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {name} cannot be made a folder: {one_line(error)}") from error
    return folder


def _with_progress(batches: list[dict[str, Any]]) -> Any:
    from tqdm import tqdm

    return tqdm(batches, unit="batch", disable=len(batches) == 1)


def _say(asked: Asked, processor: Any, first: Diagnosis, summary: dict[str, Any]) -> None:
    """Prints the table."""
    if len(asked) == 1:
        answer = processor.batch_decode(first.answer, skip_special_tokens=True)[0]
        print(f"prompt     {asked[0][1]}\nanswer     {' '.join(answer.split())}\n")
    else:
        print(f"mean of {len(asked)} scenes, ± 95 % interval\n")
    rows = table.rows(summary, first.answer.shape[1] > 1)
    print(aligned(rows, [i > 0 for i in range(len(rows[0]))]))
    if table.nothing_reduced(summary):
        print("nothing was reduced: all visual tokens were kept in every layer")
    for name, reason in summary["left_out"].items():
        print(f"{TITLES[name]}: left out: {reason}")
    print()


def _draw(
    folder: Path,
    model: Any,
    processor: Any,
    diagnosis: Diagnosis,
    inputs: dict[str, Any],
    asked: tuple[Image.Image, str],
) -> None:
    """Writes the sheets of the first prompt's images."""
    of = processor.image_processor
    norm = [
        getattr(of, f"image_{n}", None) or g for n, g in zip(("mean", "std"), GREY, strict=True)
    ]
    bases = find_bases(model, inputs, [len(image.index) for image in diagnosis.images])
    for number, base in enumerate(bases):
        if diagnosis.images[number].row > 0:
            break
        if base.grid is None:
            print(f"heat maps  left out for image {number}: {base.reason}")
            continue
        picture = asked[0] if base.pixels is None else as_picture(base.pixels, *norm)
        for name, draw in (("tokens", draw_tokens), ("attention", draw_attention)):
            file = folder / f"{name}_{number}.png"
            sheet = draw(diagnosis, number, picture, base.grid, asked[1])
            sheet.save(file)
            print(f"heat map   {file}" if name == "attention" else f"tokens     {file}")
