"""What the compiler made of the levels of the CPU operators: the instructions of each, no others.

Read from the objects that setup.py keeps.
"""

import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

OBJECTS = Path(__file__).parents[1] / "build/objects/csrc"
LEVELS = sorted((OBJECTS / "cpu").glob("level_*.o"))
AVX512 = [path for path in LEVELS if path.stem.startswith("level_avx512")]
pytestmark = pytest.mark.skipif(
    not AVX512 or platform.machine() != "x86_64" or not shutil.which("objdump"),
    reason="needs setup.py's objects of x86-64, and objdump",
)
names = {"argnames": "path", "ids": lambda path: path.stem}


@cache
def functions(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Of every function, by its mangled name: the bytes and the text of each instruction."""
    text = subprocess.run(
        ["objdump", "-d", "--insn-width=16", path], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            own = found[header[1]] = []
        elif line.count("\t") == 2:
            own.append((line.split("\t")[1], line.split("\t")[2]))
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    return [one for own in functions(path).values() for one in own]


@pytest.mark.parametrize(argvalues=sorted(OBJECTS.rglob("*.o")), **names)
def test_wide_instructions_stay_in_their_level(path):
    made = instructions(path)
    assert made
    if path not in AVX512:
        evex = [text for code, text in made if code.startswith("62 ") or re.search("%k[0-7]", text)]
        assert not evex
    if path not in [level for level in LEVELS if level.stem != "level_generic"]:
        assert not [text for _, text in made if "%ymm" in text]


@pytest.mark.parametrize(argvalues=LEVELS, **names)
def test_a_level_defines_nothing_that_another_may_share(path):
    """The linker keeps one of several functions of one name, which may be the one too wide."""
    assert [name for name in functions(path) if "_GLOBAL__N_1" not in name] == []


@pytest.mark.parametrize(argvalues=AVX512, **names)
def test_the_tile_is_registers(path):
    """The innermost loop of a product: 24 sums of 16 lanes, and not one of them in memory."""
    all_blocks = [block for own in functions(path).values() for block in blocks(own)]
    for product in ["vfmadd", "vdpbf16ps"] if path.stem == "level_avx512_bf16" else ["vfmadd"]:
        counts = [sum(t.startswith(product) and "zmm" in t for t in b) for b in all_blocks]
        loops = [b for b, count in zip(all_blocks, counts, strict=True) if count >= 24]
        assert loops and max(counts) == 24, f"no register tile of {product}"
        for loop in loops:
            assert not [text for text in loop if re.search(r"zmm.*\(%r[sb]p|zmm\d+,.*\(", text)]


def blocks(own: list[tuple[str, str]]) -> list[list[str]]:
    """What lies between two jumps."""
    found: list[list[str]] = [[]]
    for _, text in own:
        found[-1].append(text)
        if text.startswith("j"):
            found.append([])
    return found
