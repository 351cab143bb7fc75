"""A table of measurements: columns of text, as CSV, Markdown and aligned lines."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from restore_ext.text import aligned

Row = dict[str, str]


@dataclass(frozen=True)
class Column:
    """What a reader sees of a CSV's columns: `key`, and its percentiles where there are any."""

    key: str
    title: str
    number: bool = True
    spread: bool = False


def cell(row: Row, column: Column) -> str:
    value = row.get(column.key, "")
    if not value or not column.spread:
        return value
    return f"{value} ({row[f'{column.key}_p20']} to {row[f'{column.key}_p80']})"


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    rule = ["---:" if column.number else "---" for column in columns]
    lines = [[column.title for column in columns], rule]
    lines += [[cell(row, column) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """For a terminal: words to the left, numbers to the right."""
    titles = [column.title for column in columns]
    lines = [titles, *([cell(row, column) for column in columns] for row in rows)]
    return aligned(lines, [column.number for column in columns])


def said_of(rows: Sequence[Row]) -> str:
    """With what the rows were made, in one line."""
    row = rows[0]
    threads = f", {row['threads']} thread{'s' * (row['threads'] != '1')}" if row["threads"] else ""
    clock = "the thread's own time" if row["clock"] == "thread" else "wall time"
    return (
        f"`{row['command']}`: {row['model']}; {row['machine']}{threads}, {clock}, torch "
        f"{row['torch']}, transformers {row['transformers']}, commit {row['commit']}, "
        f"{row['when']}. A number is a median; in brackets, the 20th and the 80th percentile."
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bars(
    path: Path, rows: Mapping[str, Row], key: str, title: str, unit: str, base: float | None
) -> None:
    """A PNG of horizontal bars with their percentiles, of rows by name; a dashed line at `base`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name, row in rows.items() if row.get(key)]
    shown = [rows[name] for name in names]
    middle = [float(row[key]) for row in shown]
    low = [m - float(row[f"{key}_p20"]) for m, row in zip(middle, shown, strict=True)]
    high = [float(row[f"{key}_p80"]) - m for m, row in zip(middle, shown, strict=True)]
    figure = Figure(figsize=(8, 1 + 0.28 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ["#4477aa" if "RESTORE" in name else "#bbbbbb" for name in names]
    axes.barh(range(len(shown)), middle, xerr=[low, high], color=colors, ecolor="#333333")
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    if base is not None:
        axes.axvline(base, linestyle="--", color="#cc3311", linewidth=1)
    figure.savefig(path, dpi=110, metadata={"Software": None})
