"""What a search returns."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Found:
    """The best schedule of a search.

    schedule  what attach(schedule=...) takes; its "about" says how it was found, and is not read
    tokens    what each layer keeps of the largest image among the examples
    accuracy  the mean score of the examples under it; accuracy_whole: with all tokens
    flops     multiply-adds as a share of those with all tokens, see flops(); kv_bytes likewise
    trials    how many schedules were measured, in earlier runs with the same storage too
    """

    schedule: dict[str, Any]
    tokens: list[int]
    accuracy: float
    accuracy_whole: float
    flops: float
    kv_bytes: float
    trials: int

    def save(self, file: str | Path) -> None:
        """Writes the schedule as JSON, whole or not at all."""
        path = Path(file)
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(self.schedule, indent=1, default=repr) + "\n")
        os.replace(new, path)
