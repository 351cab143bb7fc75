"""What a number was measured on and with: the machine, its driver, the commit, the sources."""

import hashlib
from functools import cache
from pathlib import Path

from restore_ext import _C
from restore_ext.bench.facts import ROOT, commit, first_line, machine

__all__ = ["commit", "machine"]
SOURCES = ("csrc", "restore_ext", "bench", "python_tests", "tools", "setup.py")
KINDS = (".cpp", ".h", ".cu", ".cuh", ".py", ".sh")


def file_name(device: str) -> str:
    return "_".join(machine(device).split())


@cache
def driver() -> str:
    """The version of the GPU's driver; empty without one."""
    return first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def clocks() -> str:
    """How fast the GPU runs by now, and how warm it is. Nobody sets them: they are read."""
    asked = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return first_line("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")


@cache
def source() -> str:
    """A digest of all that a result depends on: a commit may be dirty. The same on every machine,
    so not of the library that is built from it."""
    files = [ROOT / name for name in SOURCES if (ROOT / name).is_file()]
    for folder in SOURCES:
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in KINDS and p.is_file()]
    return digest(files)


def library() -> str:
    """A digest of the library that is loaded."""
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:12]


def digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(ROOT)}\n".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def kernels() -> dict[str, str]:
    """Every file of kernels, with a digest of it and of the headers that any may include."""
    cuda = ROOT / "csrc/cuda"
    shared = [*cuda.glob("*.cuh"), *cuda.glob("*.h")]
    return {file.stem: digest([file, *shared]) for file in sorted(cuda.glob("*_kernel.cu"))}
