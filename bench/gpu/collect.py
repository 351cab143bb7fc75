"""Puts what a folder of the GPU proof holds where it belongs, however often it is asked to."""

import json
import shutil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
GOLDEN = RESULTS.parents[1] / "csrc/emulator/golden"
NAME = "gpu_proof.json"
Proof = dict[str, dict[str, dict[str, Any]]]  # GPU -> stage -> the record of its last pass


def collect(folder: Path, results: Path, golden: Path = GOLDEN) -> None:
    """What was measured, what passed, and what single instructions returned, to its place."""
    from bench.rows import append, read  # needs the library, which may not be built yet

    for file in sorted((folder / "results").glob("*.csv")):
        have = read(results / file.name)
        new = [row for row in read(file) if row not in have and row["driver"]]
        if new:
            append(results / file.name, new)
    for file in sorted((folder / "golden").glob("*.npz")):
        golden.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, golden / file.name)
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
