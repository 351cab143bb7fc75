"""What a user can get wrong, said in one line."""

from pathlib import Path
from typing import TYPE_CHECKING

from restore_ext.reduce import DEFAULT_KEEP
from restore_ext.text import one_line

if TYPE_CHECKING:
    from PIL import Image


class UserError(Exception):
    """Ends a command with its message and exit code 2; a traceback would not help."""


def check_reduction(
    method: str, keep: int | None, repeats: int, schedule: str | None = None
) -> int | None:
    """The budget for attach(), None for a method that takes none, and for a schedule alone.

    Refuses what attach() would refuse, before a model is loaded.
    """
    from restore_ext.methods import find_card, list_methods

    if method not in list_methods():
        raise UserError(f"--method must be one of {', '.join(list_methods())}, got {method}")
    if method == "schedule":
        raise UserError(
            "--method schedule needs the tokens of every layer: --schedule FILE, as restore-ext "
            "search writes it"
        )
    if schedule is not None:
        _check_schedule(schedule, method, keep)
    budget = find_card(method).budget
    if keep is not None and not budget:
        raise UserError(f"--keep must not be given with --method {method}, which takes no budget")
    if keep is not None and keep < 1:
        raise UserError(f"--keep must be at least 1, got {keep}")
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}")
    return DEFAULT_KEEP if keep is None and budget and schedule is None else keep


def _check_schedule(schedule: str, method: str, keep: int | None) -> None:
    from restore_ext.reduce import DEFAULT_METHOD
    from restore_ext.stages import STAGE_METHODS, read_schedule

    try:
        read_schedule(schedule)
    except (ValueError, TypeError) as error:
        raise UserError(f"--schedule: {one_line(error)}") from error
    if method in STAGE_METHODS:
        raise UserError(f"--schedule must not be given with --method {method}, which is one itself")
    if method != DEFAULT_METHOD and keep is None:
        raise UserError(f"--method {method} before a --schedule needs --keep")


def open_image(file: str, option: str = "--image") -> "Image.Image":
    """The picture in `file`, as RGB; option  that a mistake is blamed on."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(file)
    if not path.exists():
        raise UserError(f"{option}: there is no file {file}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{option}: {file} cannot be read as an image: {one_line(error)}"
        ) from error
