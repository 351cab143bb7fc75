"""What `restore-ext demo` prints, kept with what it ran on, for docs/quickstart.md.

python -m bench.demo      runs it, and keeps it in bench/results/demo.json
"""

import contextlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path

from bench.machine import ROOT
from restore_ext.bench.facts import made
from restore_ext.cli import main as restore_ext

RESULT = ROOT / "bench/results/demo.json"
# A held-out scene that plain pruning gets wrong and RESTORE right: how often that is, tables say.
COMMAND = "restore-ext demo --method divprune --seed 10"
THREADS = {"1": "one core", "2": "two cores"}


def main() -> None:
    facts = made("cpu", "wall")  # now: what runs is what was read now
    out = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
    ):
        failed = restore_ext(shlex.split(COMMAND)[1:])
    if failed:
        sys.exit(failed)
    kept = {"command": COMMAND, "made": facts, "printed": out.getvalue()}
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


def block(result: Path = RESULT) -> str:
    """The command, what it printed, and on what."""
    kept = json.loads(result.read_text())
    made = kept["made"]
    cores = THREADS.get(made["threads"], f"{made['threads']} cores")
    return (
        f"```sh\n$ {kept['command']}\n```\n"
        f"```text output varies\n{kept['printed'].strip()}\n```\n\n"
        f"Medians on {cores} of an {made['machine']}, torch {made['torch']}, transformers "
        f"{made['transformers']}, commit {made['commit']}, {made['when']}; prefill counts the "
        "vision tower and the reduction."
    )


if __name__ == "__main__":
    main()
