"""What a user can get wrong, said in one line."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


DEFAULT_KEEP = 64


class UserError(Exception):
    """Ends a command with its message and exit code 2; a traceback would not help."""


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_reduction(method: str, keep: int | None, repeats: int) -> int | None:
    """The budget for attach(), None for a method that takes none.

    Refuses what attach() would refuse, before a model is loaded.
    """
    from restore_ext.methods import find_card, list_methods

    if method not in list_methods():
        raise UserError(f"--method must be one of {', '.join(list_methods())}, got {method}")
    if method == "schedule":
        raise UserError(
            "--method schedule needs the tokens of every layer, which only Python can give it: "
            "attach(model, schedule=...)"
        )
    budget = find_card(method).budget
    if keep is not None and not budget:
        raise UserError(f"--keep must not be given with --method {method}, which takes no budget")
    if keep is not None and keep < 1:
        raise UserError(f"--keep must be at least 1, got {keep}")
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}")
    return DEFAULT_KEEP if keep is None and budget else keep


def open_image(file: str) -> "Image.Image":
    """The picture in `file`, as RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(file)
    if not path.exists():
        raise UserError(f"--image: there is no file {file}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"--image: {file} cannot be read as an image: {one_line(error)}") from error
