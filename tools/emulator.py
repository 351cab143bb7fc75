"""Builds the CUDA kernels for the CPU: the same entries and .cu files, run by csrc/emulator.

python tools/emulator.py MODE [--only OP ...]     prints the path of the library it built

source   the kernels as C++
check    the same, every access watched: races, bounds, uninitialised reads, async misuse
ptx80    nvcc's PTX for that architecture, translated to C++: inline PTX included
ptx90a   likewise

The library registers the CUDA bodies as torch.ops.restore_ext_emulated.* on the CPU; pytest's
--emulator (python_tests/conftest.py) puts them under restore_ext.ops. With --only, the entries and
kernels whose file names begin with one of the names, and what all share.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
TORCH = Path(torch.__file__).parent
MODES = ("source", "check", "ptx80", "ptx90a")
SHARED = ("device.cu", "entry.cpp")

COMMON = f"-std=c++20 -g -fPIC -fvisibility=hidden -I{ROOT}/csrc/emulator/include"
EMULATED = f"{COMMON} -O2 -march=native -DCUEMU -Wno-unknown-pragmas -Wno-attributes"
ENTRY = (
    f"{COMMON} -O1 -DRESTORE_EXT_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000 "
    "-DRESTORE_EXT_NAMESPACE=restore_ext_emulated -DRESTORE_EXT_CUDA_KEY=CPU"
)


def ninja(mode: str, only: list[str]) -> tuple[str, Path]:
    """The build file of one library, and the library's path."""
    cuda = f"-isystem {CUDA}/include -isystem {CUDA}/include/cccl"
    watched = " -DCUEMU_CHECK" if mode == "check" else ""
    kernel = f"{EMULATED}{watched} {cuda}"
    if mode == "check":  # compiled with, NOT linked with: the checker takes the calls
        kernel = kernel.replace("-O2", "-O1") + " -fsanitize=thread"
    name = "-".join([mode, *only])
    folder = f"build/emulator/{name}.d"
    library = ROOT / f"build/emulator/{name}.so"
    lines = [
        f"builddir = {folder}",
        "rule cxx",
        "  command = g++ $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule ptx",
        f"  command = {CUDA}/bin/nvcc -O3 -std=c++17 -arch=compute_{mode[3:]} "
        "-lineinfo -MD -MF $out.d -ptx $in -o $out",
        "  depfile = $out.d",
        "rule translate",
        f"  command = {sys.executable} csrc/emulator/ptx2cpp.py $in > $out || (rm -f $out; false)",
        "rule link",
        f"  command = g++ -shared $in -o $out -L{TORCH}/lib -ltorch_cpu -lc10",
    ]
    objects = []
    translator = " ".join(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/emulator").glob("ptx*.py"))

    def compile(source: str, flags: str) -> None:
        target = f"{folder}/{source.replace('/', '.')}.o"
        lines.append(f"build {target}: cxx {source}\n  flags = {flags}")
        objects.append(target)

    def wanted(path: Path) -> bool:
        return not only or path.name in SHARED or any(path.name.startswith(o) for o in only)

    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        if not wanted(path):
            continue
        source = str(path.relative_to(ROOT))
        compile(source, kernel)
        if mode.startswith("ptx") and path.name not in SHARED:
            ptx = f"{folder}/{path.stem}.ptx"
            lines.append(f"build {ptx}: ptx {source}")
            lines.append(f"build {ptx}.cpp: translate {ptx} | {translator}")
            compile(f"{ptx}.cpp", f"{kernel.replace('-O2', '-O1')} -w -fwrapv -ffp-contract=off")
    for path in sorted((ROOT / "csrc/emulator/src").glob("*.cpp")):
        compile(str(path.relative_to(ROOT)), f"{EMULATED}{watched} {cuda} -fvisibility=default")
    for path in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
        if path.name != "entry.cpp" and wanted(path):
            compile(str(path.relative_to(ROOT)), f"{ENTRY} -isystem {TORCH}/include {cuda}")
    for source in ("csrc/emulator/entry.cpp", "csrc/schema.cpp"):
        compile(source, f"{ENTRY} -isystem {TORCH}/include {cuda}")
    lines.append(f"build {library}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n", library


def build(mode: str, only: list[str]) -> Path:
    text, library = ninja(mode, only)
    file = library.with_suffix(".ninja")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    command = [Path(sys.executable).parent / "ninja", "-C", ROOT, "-f", file, "--quiet"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return library


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    arguments = parser.parse_args()
    print(build(arguments.mode, arguments.only))
