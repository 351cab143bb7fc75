"""Rows of measurements in results/<machine>.csv: appended, never rewritten."""

import csv
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.machine import commit, driver, file_name, source

NAMES = [
    *("op", "case", "dtype", "provider", "how", "cache"),
    *("us", "us_p20", "us_p80", "speedup", "speedup_p20", "speedup_p80"),
    *("tflops", "gbs", "error", "note"),
    *("threads", "when", "driver", "torch", "commit", "source"),
]


class Rows:
    """A number without its machine, its torch and its commit is a rumour."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / f"{file_name(device)}.csv"
        self.made = {
            "driver": (driver() or "unknown") if device == "cuda" else "",
            "torch": torch.__version__,
            "commit": commit(),
            "source": source(),
        }

    def add(self, rows: list[dict[str, Any]]) -> None:
        when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
        append(self.path, [{"when": when} | self.made | row for row in rows])

    def has(self, name: dict[str, str]) -> bool:
        """Whether these sources have rows of that op, case and dtype."""
        wanted = name | {"source": self.made["source"]}
        return any(wanted.items() <= row.items() for row in read(self.path))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
