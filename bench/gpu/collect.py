"""Puts what a folder of the GPU proof holds into bench/results, however often it is asked to."""

import json
from pathlib import Path
from typing import Any

from bench.rows import append, read

RESULTS = Path(__file__).parent.parent / "results"
NAME = "gpu_proof.json"
Proof = dict[str, dict[str, dict[str, Any]]]  # GPU -> stage -> the record of its last pass


def collect(folder: Path, results: Path) -> None:
    for file in sorted((folder / "results").glob("*.csv")):
        have = read(results / file.name)
        new = [row for row in read(file) if row not in have and row["driver"]]
        if new:
            append(results / file.name, new)
    proof = passed(results)
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        if not isinstance(record, dict) or record.get("dry_run") or record["status"] != "ok":
            continue
        stages = proof.setdefault(record["gpu"], {})
        if record["when"] >= stages.get(record["stage"], record)["when"]:
            stages[record["stage"]] = record
    if proof:
        results.mkdir(exist_ok=True)
        (results / NAME).write_text(json.dumps(proof, indent=1, sort_keys=True) + "\n")


def passed(results: Path = RESULTS) -> Proof:
    """Which stages passed, on which GPU, with what; nothing where no GPU has been."""
    file = results / NAME
    return json.loads(file.read_text()) if file.is_file() else {}
