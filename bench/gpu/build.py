"""Makes sure that restore_ext._C has every operator for the GPU at hand; builds it if not.

    python -m bench.gpu.build [--rehearse]

A library built elsewhere (RESTORE_EXT_CUDA=1 python setup.py build_ext --inplace --force, no GPU
needed) is used as it is: it runs under any torch from 2.11 on.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# Not bench.machine's, which loads the library that is to be built.
ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--look", metavar="ARCH", help="say what the library lacks, and no more")
    parser.add_argument("--rehearse", action="store_true", help="the CPU operators; builds nothing")
    a = parser.parse_args(argv)
    if a.look is not None or a.rehearse:
        why = lack(a.look or "")
        sys.exit(why or 0)
    arch = this_arch()
    if why := asked(arch):
        print(f"{why}: building for {arch}", flush=True)
        build(arch)
        why = asked(arch)
    print(why or f"the library has every operator for {arch}")
    sys.exit(1 if why else 0)


def this_arch() -> str:
    """As TORCH_CUDA_ARCH_LIST has it; from Hopper on with the instructions of that chip alone."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major in (9, 10) else "")


def asked(arch: str) -> str:
    """`lack` in another process: one that has loaded a library does not load it anew."""
    command = [sys.executable, "-m", "bench.gpu.build", "--look", arch]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = answer.stderr.strip().splitlines()
    return (said or ["it failed"])[-1] if answer.returncode else ""


def lack(arch: str) -> str:
    """What the library lacks for that architecture ("" asks for the CPU); "" if nothing."""
    from restore_ext import _C, ops  # noqa: F401

    has, key = torch._C._dispatch_has_kernel_for_dispatch_key, "CUDA" if arch else "CPU"
    without = [op for op in operators() if not has(f"restore_ext::{op}", key)]
    if without:
        return f"no {key} kernel for {', '.join(without)}"
    if arch and not any(is_for(built, arch) for built in _C.cuda_archs.split()):
        return f"the library was built for {_C.cuda_archs}, not for {arch}"
    return ""


def operators() -> list[str]:
    return re.findall(r'"(\w+)\(', (ROOT / "csrc/schema.cpp").read_text())


def is_for(built: str, arch: str) -> bool:
    """Whether a proof on a GPU of `arch` may use what was built: its own machine code.

    PTX runs on a newer GPU, too, but without the kernels for Hopper, and compiled by the driver
    there: that would prove something else. So would 9.0 without its `a`.
    """
    from restore_ext.archs import runs

    code = built.removesuffix("+PTX")
    major, minor = map(int, arch.rstrip("a").split("."))
    return runs(code, (major, minor)) and not (arch == "9.0a" and code == "9.0")


def build(arch: str) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    environment = os.environ | {"RESTORE_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
