"""Builds the CUDA kernels for the CPU: the same entries and .cu files, run by csrc/emulator.

python tools/emulator.py MODE ... [--only OP ...] [--quick]     prints the paths of what it built

source   the kernels as C++
check    the same, every access watched: races, bounds, uninitialised reads, async misuse
ptx80    nvcc's PTX for that architecture, translated to C++: inline PTX included
ptx90a   likewise
modules  the emulator itself as a Python module, once for every mode (docs/emulator.md)

A library registers the CUDA bodies as torch.ops.restore_ext_emulated.* on the CPU; pytest's
--emulator (python_tests/conftest.py) puts them under restore_ext.ops. With --only, the entries and
kernels whose file names begin with one of the names, and what all share. With --quick the PTX modes
have one instantiation per path: no float16, attention's tiles for head size 64 alone. Launching one
that was left out is an error.
"""

import argparse
import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
TORCH = Path(torch.__file__).parent
MODES = ("source", "check", "ptx80", "ptx90a")
SHARED = ("device.cu", "entry.cpp")
NOT_IN_QUICK = "6__half|(prefill|decode|hopper)_kernelI.*Li(96|128)E"

HEADERS = f"-isystem {CUDA}/include -isystem {CUDA}/include/cccl"
# -fno-gnu-unique: libraries of several modes may live in one process.
COMMON = f"-std=c++20 -g -fno-var-tracking -fPIC -fno-gnu-unique -Icsrc/emulator/include {HEADERS}"
HIDDEN = "-fvisibility=hidden"
EMULATED = f"{COMMON} -march=native -DCUEMU -Wno-unknown-pragmas -Wno-attributes -Wno-psabi"
# Each PTX instruction rounds for itself, and its whole numbers wrap around.
TRANSLATED = f"{EMULATED} {HIDDEN} -w -fwrapv -ffp-contract=off"
ENTRY = (
    f"{COMMON} {HIDDEN} -O1 -DRESTORE_EXT_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000 "
    f"-DRESTORE_EXT_NAMESPACE=restore_ext_emulated -DRESTORE_EXT_CUDA_KEY=CPU "
    f"-isystem {TORCH}/include"
)
BINDINGS = (
    f"{COMMON} {HIDDEN} -O1 -DCUEMU -isystem {TORCH}/include "
    f"-isystem {sysconfig.get_path('include')}"
)
RULES = f"""
rule cxx
  command = g++ $flags -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule ptx
  command = {CUDA}/bin/nvcc -O3 -std=c++17 -lineinfo -arch=compute_$arch -MD -MF $out.d -ptx $in $
    -o $out
  depfile = $out.d
rule translate
  command = {sys.executable} csrc/emulator/ptx2cpp.py $in $skip > $out || (rm -f $out; false)
rule link
  command = g++ -shared $in -o $out $libraries
"""


class Build:
    """The statements of a build file. Objects lie in one folder: what modes share is built once."""

    folder = "build/emulator/objects"

    def __init__(self, to_run_long: bool = True, skip: str = "") -> None:
        self.skip = skip
        # How the kernels' C++, and that from their PTX, are optimised.
        self.kernel_level, self.ptx_level = ("-O2", "-O1") if to_run_long else ("-O1", "-O0")
        self.lines = [f"builddir = {self.folder}", RULES]
        self.made: set[str] = set()

    def compile(self, source: str, flags: str, name: str = "") -> str:
        target = f"{self.folder}/{name}{source.replace('/', '.')}.o"
        if target not in self.made:
            self.made.add(target)
            self.lines.append(f"build {target}: cxx {source}\n  flags = {flags}")
        return target

    def kernels(self, source: str, mode: str) -> list[str]:
        """The objects of a .cu file: its launchers and kernels as C++, and from PTX the kernels."""
        if mode == "check":  # compiled with, NOT linked with: the checker takes the calls
            flags = f"{EMULATED} {HIDDEN} -O1 -DCUEMU_CHECK -fsanitize=thread"
            return [self.compile(source, flags, "check.")]
        objects = [self.compile(source, f"{EMULATED} {HIDDEN} {self.kernel_level}")]
        if mode.startswith("ptx") and Path(source).name not in SHARED:
            ptx = f"{self.folder}/{mode}.{Path(source).stem}.ptx"
            translator = " ".join(relative("csrc/emulator/ptx*.py"))
            cpp = f"{ptx}.{'quick.' if self.skip else ''}cpp"
            self.lines += [f"build {ptx}: ptx {source}\n  arch = {mode[3:]}"]
            self.lines += [f"build {cpp}: translate {ptx} | {translator}"]
            self.lines += [f"  skip = --skip '{self.skip}'"] if self.skip else []
            objects.append(self.compile(cpp, f"{TRANSLATED} {self.ptx_level}"))
        return objects

    def emulator(self, mode: str) -> list[str]:
        watched, name = (" -DCUEMU_CHECK", "check.") if mode == "check" else ("", "")
        sources = relative("csrc/emulator/src/*.cpp")
        return [self.compile(s, f"{EMULATED} -O2{watched}", name) for s in sources]

    def link(self, library: Path, objects: list[str], libraries: str = "") -> Path:
        self.lines.append(f"build {library}: link {' '.join(objects)}\n  libraries = {libraries}")
        return library

    def run(self) -> None:
        folder = ROOT / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        ninja = Path(sys.executable).parent / "ninja"
        with (folder / "lock").open("w") as lock:  # ninja does not expect another in its folder
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
            command = [ninja, "-C", ROOT, "-f", folder / "build.ninja", "-j2", "--quiet"]
            subprocess.run(command, check=True, stdout=sys.stderr)


def relative(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def libraries(modes: list[str], only: list[str], quick: bool) -> list[Path]:
    """The operators of `only`, or all, in each mode."""
    build = Build(skip=NOT_IN_QUICK if quick else "")

    def wanted(source: str) -> bool:
        file = Path(source).name
        return not only or file in SHARED or any(file.startswith(o) for o in only)

    sources = [s for s in relative("csrc/cuda/*.cpp") if not s.endswith("/entry.cpp")]
    sources = [*filter(wanted, sources), "csrc/emulator/entry.cpp", "csrc/schema.cpp"]
    entries = [build.compile(source, ENTRY) for source in sources]
    paths = []
    for mode in modes:
        objects = [*entries, *build.emulator(mode)]
        for source in filter(wanted, relative("csrc/cuda/*.cu")):
            objects += build.kernels(source, mode)
        # Only what is translated from PTX differs.
        suffix = ["quick"] if quick and mode.startswith("ptx") else []
        path = ROOT / f"build/emulator/{'-'.join([mode, *only, *suffix])}.so"
        paths.append(build.link(path, objects, f"-L{TORCH}/lib -ltorch_cpu -lc10"))
    build.run()
    return paths


def modules() -> dict[str, Path]:
    """The Python modules: the emulator's controls, device wrappers and own tests in every mode, or
    those in CUEMU_MODES."""
    build = Build(to_run_long=False)
    sources = ["csrc/emulator/wrappers.cu", *relative("csrc/emulator/selftest/*.cu")]
    paths = {}
    for mode in os.environ.get("CUEMU_MODES", " ".join(MODES)).split():
        objects = [build.compile("csrc/emulator/bindings.cpp", BINDINGS), *build.emulator(mode)]
        for source in sources:
            # Many instances: where they show nothing new, they are left out.
            if source.endswith("hopper.cu") and mode not in ("source", "ptx90a"):
                continue
            objects += build.kernels(source, mode)
        paths[mode] = build.link(ROOT / f"build/emulator/cuemu-{mode}.so", objects)
    build.run()
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="+", choices=[*MODES, "modules"])
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    made = [*modules().values()] if "modules" in arguments.mode else []
    if modes := [mode for mode in MODES if mode in arguments.mode]:
        made += libraries(modes, arguments.only, arguments.quick)
    print(*made, sep="\n")
