"""Plants each bug of the *mutants.py here in a copy of the tree: do the tests catch it?

python tools/mutate_kernels.py [-k WORDS] [--mode MODE] [--list]

For every mode that must catch a bug: builds the emulator of the operator, runs the subset of its
tests. A subset must pass without a bug, or its verdicts would mean nothing. Fails if a bug is
missed, does not build, or is not found in its file any more.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from attention_mutants import PREFILL_KERNELS
from kernel_mutants import KERNELS
from mutants import GOLDEN, INSTRUCTIONS, Mutant

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build/mutants"
COPIED = ("csrc", "tools", "python_tests", "restore_ext", "pyproject.toml")
LIMIT = 600  # seconds of tests; a bug may hang a kernel
BUILD_LIMIT = 1800  # of a build, on a machine that does other things too


def copy_tree() -> None:
    """Beside what was built there before: what has not changed keeps its time, and its objects."""
    for name in COPIED:
        source, target = ROOT / name, TREE / name
        if source.is_file():
            TREE.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
            continue
        for path in source.rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            copy = target / path.relative_to(source)
            if not copy.exists() or copy.read_bytes() != path.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def python(limit: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TREE,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )


def run_tests(mutant: Mutant, mode: str) -> str:
    """What became of the tests: "passed", "failed", "does not build", "builds too long"."""
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests]
    command += ["-k", mutant.subset] if mutant.subset else []
    modes = f"source {mode}" if mutant.tests == GOLDEN else mode  # it compares the two
    # The emulator's own tests build their modules: those of the modes asked for.
    what = [mode, "--only", *mutant.only] if mutant.only else ["modules"]
    try:
        built = python(BUILD_LIMIT, "tools/emulator.py", *what, CUEMU_MODES=modes)
    except subprocess.TimeoutExpired:
        return "builds too long"
    if built.returncode:
        return "does not build"
    command += ["--emulator", built.stdout.strip()] if mutant.only else []
    try:
        done = python(LIMIT, *command, CUEMU_MODES=modes)
    except subprocess.TimeoutExpired:
        return "failed"  # it hangs
    if done.returncode == 5:
        return "nothing to run"
    return "failed" if done.returncode else "passed"


def verdict(mutant: Mutant, mode: str, healthy: dict) -> str:
    subset = (mutant.tests, mutant.subset, mutant.only, mode)
    if subset not in healthy:
        healthy[subset] = run_tests(mutant, mode)
    if healthy[subset] != "passed":
        return f"without it: {healthy[subset]}"
    file = TREE / mutant.file
    text = file.read_text()
    if mutant.old not in text:
        return "not found in its file"
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        result = run_tests(mutant, mode)
    finally:
        file.write_text(text)
    return {"failed": "caught", "passed": "MISSED"}.get(result, result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="WORDS", default="", help="only where name or file has them")
    parser.add_argument("--mode", help="only this one")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    chosen = [
        m
        for m in [*INSTRUCTIONS, *KERNELS, *PREFILL_KERNELS]
        if arguments.k in f"{m.file} {m.name}"
    ]
    if arguments.list:
        for m in chosen:
            print(f"{m.file:44} {m.name:44} {' '.join(m.modes)}")
        return 0
    copy_tree()
    healthy: dict = {}
    verdicts = []
    for mutant in chosen:
        for mode in mutant.modes:
            if arguments.mode in (None, mode):
                verdicts.append(verdict(mutant, mode, healthy))
                print(f"{verdicts[-1]:8} {mode:7} {mutant.file}: {mutant.name}", flush=True)
    caught = verdicts.count("caught")
    print(f"{caught} of {len(verdicts)} caught")
    return 0 if verdicts and caught == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
