"""Builds restore_ext._C with the AVX-512 levels lowered to AVX2, to test them without such a core.

python tools/lowered.py     prints the path; RESTORE_EXT_LIBRARY=<path> has the tests load it

GCC's vectors of 64 bytes become two of 32; where a level takes an instruction by its name, its
source has a body for other processors that gives the same bits. What setup.py compiled last is
linked, but for the levels and the list of them.
"""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build/lowered"
OBJECTS = ROOT / "build/objects"
LIBRARIES = f"-L{Path(torch.__file__).parent}/lib -ltorch_cpu -ltorch -lc10 -ldl"
# -O2 takes half of -O3's time, -O1 would not fuse multiplications and additions.
FLAGS = "-DRESTORE_EXT_LOWERED -Wno-psabi -O2 -g0"
RULES = """
rule cxx
  command = c++ -MMD -MF $out.d $cflags -c $in -o $out $post_cflags $flags
  depfile = $out.d
  deps = gcc
rule link
  command = c++ -shared $in -o $out $libraries -Wl,--exclude-libs,ALL
"""


def recompiled(source: str) -> bool:
    return re.search(r"csrc/cpu/(kernels|level_avx512\w*)\.cpp$", source) is not None


def library() -> Path:
    """Built anew where something changed."""
    plan = (OBJECTS / "build.ninja").read_text()
    lines = [f"builddir = {FOLDER}", *re.findall(r"^(?:post_)?cflags = .*", plan, re.M), RULES]
    objects = []
    for target, source in re.findall(r"^build (\S+): compile (\S+\.cpp)$", plan, re.M):
        if "/csrc/cuda/" in source:
            continue
        if recompiled(source):
            target = FOLDER / f"{Path(source).stem}.o"
            lines += [f"build {target}: cxx {source}", f"  flags = {FLAGS}"]
        objects.append(str(target))
    path = FOLDER / "_C.abi3.so"
    lines += [f"build {path}: link {' '.join(objects)}", f"  libraries = {LIBRARIES}"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    ninja = Path(sys.executable).parent / "ninja"
    with (FOLDER / "lock").open("w") as lock:  # ninja does not expect another in its folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        (FOLDER / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja, "-f", FOLDER / "build.ninja", "-j2", "--quiet"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return path


if __name__ == "__main__":
    print(os.path.relpath(library()))
