"""Builds the CUDA kernels for the CPU: the same entries and .cu files, run by csrc/emulator.

python tools/emulator.py MODE [--only OP ...]     prints the path of the library it built

source   the kernels as C++
check    the same, every access watched: races, bounds, uninitialised reads, async misuse
ptx80    nvcc's PTX for that architecture, translated to C++: inline PTX included
ptx90a   likewise
modules  the emulator itself as a Python module, once for every mode (docs/emulator.md)

A library registers the CUDA bodies as torch.ops.restore_ext_emulated.* on the CPU; pytest's
--emulator (python_tests/conftest.py) puts them under restore_ext.ops. With --only, the entries and
kernels whose file names begin with one of the names, and what all share.
"""

import argparse
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
  command = {sys.executable} csrc/emulator/ptx2cpp.py $in > $out || (rm -f $out; false)
rule link
  command = g++ -shared $in -o $out $libraries
"""


class Build:
    """The statements of a build file. Objects lie in a folder of their own."""

    def __init__(self, folder: str, to_run_long: bool = True) -> None:
        self.folder = folder
        # How the kernels' C++, and that from their PTX, are optimised.
        self.kernel_level, self.ptx_level = ("-O2", "-O1") if to_run_long else ("-O1", "-O0")
        self.lines = [f"builddir = {folder}", RULES]
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
            self.lines += [f"build {ptx}: ptx {source}\n  arch = {mode[3:]}"]
            self.lines += [f"build {ptx}.cpp: translate {ptx} | {translator}"]
            objects.append(self.compile(f"{ptx}.cpp", f"{TRANSLATED} {self.ptx_level}"))
        return objects

    def emulator(self, mode: str) -> list[str]:
        watched, name = (" -DCUEMU_CHECK", "check.") if mode == "check" else ("", "")
        sources = relative("csrc/emulator/src/*.cpp")
        return [self.compile(s, f"{EMULATED} -O2{watched}", name) for s in sources]

    def link(self, library: Path, objects: list[str], libraries: str = "") -> Path:
        self.lines.append(f"build {library}: link {' '.join(objects)}\n  libraries = {libraries}")
        return library

    def run(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(self.lines) + "\n"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [Path(sys.executable).parent / "ninja", "-C", ROOT, "-f", file, "-j2", "--quiet"]
        subprocess.run(command, check=True, stdout=sys.stderr)


def relative(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def library(mode: str, only: list[str]) -> Path:
    """The operators of `only`, or all, in one mode."""
    name = "-".join([mode, *only])
    build = Build(f"build/emulator/{name}.d")

    def wanted(source: str) -> bool:
        file = Path(source).name
        return not only or file in SHARED or any(file.startswith(o) for o in only)

    objects = build.emulator(mode)
    for source in filter(wanted, relative("csrc/cuda/*.cu")):
        objects += build.kernels(source, mode)
    entries = [s for s in relative("csrc/cuda/*.cpp") if not s.endswith("/entry.cpp")]
    for source in [*filter(wanted, entries), "csrc/emulator/entry.cpp", "csrc/schema.cpp"]:
        objects.append(build.compile(source, ENTRY))
    path = ROOT / f"build/emulator/{name}.so"
    build.link(path, objects, f"-L{TORCH}/lib -ltorch_cpu -lc10")
    build.run(path.with_suffix(".ninja"))
    return path


def modules() -> dict[str, Path]:
    """The Python modules: the emulator's controls, device wrappers and own tests in every mode, or
    those in CUEMU_MODES."""
    build = Build("build/emulator/modules.d", to_run_long=False)
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
    build.run(ROOT / "build/emulator/modules.ninja")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=[*MODES, "modules"])
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    arguments = parser.parse_args()
    if arguments.mode == "modules":
        print(*modules().values(), sep="\n")
    else:
        print(library(arguments.mode, arguments.only))
