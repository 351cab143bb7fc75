"""Holds a wheel with CUDA kernels to what it promises: the stable ABI of torch 2.11, and one binary
for a torch with CUDA and one without.

python tools/check_abi.py WHEEL [--quick]

torch-abi-audit reads it; this torch loads it; then torch 2.11.0, whose Linux wheel on PyPI is the
one for CUDA 13.0, does (530 MB, kept in build/abi; --quick leaves it out), on stand-ins for the
NVIDIA libraries that are not here. Each time the CUDA kernels must be registered and the operators'
tests pass on the CPU. Nothing runs on a GPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build/abi"
OLDEST = "2.11.0"
LOADS = """
import sys
import torch, restore_ext
from restore_ext import _C, ops
assert sys.argv[1] in _C.__file__, _C.__file__
assert "cuda" in ops.DEVICE_TYPES
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("restore_ext::")}
lacking = {name for name in names if not has(name, "CUDA")}
assert names and not lacking, f"no CUDA kernel for {lacking}"
print(f"torch {torch.__version__}: {len(names)} operators, each with a CUDA kernel")
"""


def audit(library: Path) -> None:
    tool = Path(sys.executable).parent / "torch-abi-audit"
    said = subprocess.run([tool, library], capture_output=True, text=True, check=True).stdout
    print(said.strip())
    facts = " ".join(said.split())
    for fact in ("STABLE", OLDEST, "abi3"):
        assert fact in facts, f"torch-abi-audit must say {fact}"


def oldest_torch() -> dict[str, str]:
    """The environment in which Python finds torch 2.11.0+cu130."""
    site, stubs = CACHE / "site", CACHE / "stubs"
    if not (stubs / "done").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, f"torch=={OLDEST}", "--dest", str(CACHE)], check=True)
        wheel = next(CACHE.glob(f"torch-{OLDEST}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        wheel.unlink()
        stub = [sys.executable, str(ROOT / "tools/stub_libraries.py")]
        subprocess.run([*stub, str(site / "torch/lib"), str(stubs)], check=True)
        (stubs / "done").touch()
    return {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": f"{stubs}:/usr/local/cuda/lib64"}


def check_under(environment: dict[str, str], unpacked: str) -> None:
    """Loads the unpacked wheel, and only that, and runs the operators' tests on the CPU."""
    paths = [unpacked, environment.get("PYTHONPATH", "")]
    environment = os.environ | environment | {"PYTHONPATH": ":".join(filter(None, paths))}
    python = [sys.executable, "-P"]
    subprocess.run([*python, "-c", LOADS, unpacked], env=environment, check=True, cwd=unpacked)
    tests = [
        str(ROOT / f"python_tests/test_{contract.stem}.py")
        for contract in sorted((ROOT / "csrc/contracts").glob("*.h"))
        if contract.stem != "require"
    ]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath="]
    subprocess.run([*pytest, *tests, "-k", "cpu"], env=environment, check=True, cwd=unpacked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(arguments.wheel) as archive:
            archive.extractall(unpacked)
        audit(Path(unpacked) / "restore_ext/_C.abi3.so")
        check_under({}, unpacked)
        if not arguments.quick:
            check_under(oldest_torch(), unpacked)


if __name__ == "__main__":
    main()
