"""What a number was measured on and with."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

import restore_ext

ROOT = Path(__file__).resolve().parents[2]


def machine(device: str | torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


@cache
def commit() -> str:
    """Of the source tree; where there is none, the release.

    RESTORE_EXT_COMMIT says it where the sources were copied to a machine without their .git.
    """
    said = os.environ.get("RESTORE_EXT_COMMIT")
    found = first_line("git", "describe", "--always", "--dirty") if (ROOT / ".git").exists() else ""
    return said or found or f"release {restore_ext.__version__}"


def first_line(*command: str) -> str:
    """What a program says first, called in the root; empty if it is not there or fails."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip().partition("\n")[0]


def made(device: str | torch.device, clock: str) -> dict[str, str]:
    """Columns of every row: a number without its machine, its torch and its commit is a rumour."""
    facts = {
        "machine": machine(device),
        "threads": str(torch.get_num_threads()) if torch.device(device).type == "cpu" else "",
        "clock": clock,
        "torch": torch.__version__,
        "commit": commit(),
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    try:
        import transformers
    except ImportError:
        return facts | {"transformers": ""}
    return facts | {"transformers": transformers.__version__}
