"""Words for people: tables in a terminal, and errors in a line."""

from collections.abc import Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    """Rows of cells as lines, the first with a rule under it; a row may end early.

    numbers  of each column: whether it goes to the right
    """
    columns = list(zip_longest(*rows, fillvalue=""))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
