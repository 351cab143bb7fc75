"""What a GPU says to fixed operands, kept to hold the emulator to it.

python tools/golden.py record [FOLDER]    on a GPU: builds csrc/emulator/wrappers.cu with nvcc, runs
                                          every wrapper, writes FOLDER/<gpu>.npz
                                          (FOLDER: csrc/emulator/golden)
python tools/golden.py compare FILE MODE  FILE's outputs against the emulator in that mode

python_tests/emulator/test_golden.py compares every file in csrc/emulator/golden.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
HOPPER = 90  # the first of the architecture that has wgmma, and the last


def load(path):
    """A module built from csrc/emulator/bindings.cpp."""
    # A name of its own: pybind11 keeps one module a name.
    name = f"{Path(path).stem}.cuemu"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits_of(x, half):
    """float32 as the bits of the 16-bit type: numpy has no bfloat16."""
    t = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    return t.to(torch.float16 if half else torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def registers_of(bits):
    """Neighbouring 16-bit elements as 32-bit registers."""
    return np.ascontiguousarray(bits).view(np.uint32)


def outputs(module, capability):
    """Every wrapper's answer to the same operands, by name."""
    rng = np.random.default_rng(20261121)
    said = {}
    rows = rng.integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    said["ldmatrix"] = module.ldmatrix(rows, False)
    said["ldmatrix_trans"] = module.ldmatrix(rows, True)
    for half in (False, True):
        a = registers_of(bits_of(rng.standard_normal((32, 8)), half))
        b = registers_of(bits_of(rng.standard_normal((32, 4)), half))
        c = rng.standard_normal((32, 4)).astype(np.float32)
        said[f"mma_{'f16' if half else 'bf16'}"] = module.mma(a, b, c, half)
    data = rng.integers(0, 256, (2, 32, 16), dtype=np.uint8)
    said["cp_async"] = module.cp_async(data, rng.integers(0, 2, (2, 32), dtype=np.uint8))
    ends = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 128, -126, -127, -149, -150])
    x = np.concatenate([ends, np.linspace(-140, 130, 500), rng.standard_normal(500)])
    said["exp2"] = module.exp2(x.astype(np.float32))
    if capability // 10 == HOPPER // 10:
        said |= hopper_outputs(module, rng)
    return said


def hopper_outputs(module, rng):
    said = {}
    steps, K = 4, 64
    for half in (False, True):
        for N in (64, 96, 128):
            a = bits_of(rng.standard_normal((64, K)), half)
            b = bits_of(rng.standard_normal((N, K)), half)
            registers = rng.standard_normal((steps, 128, 8))
            c = rng.standard_normal((128, N // 2)).astype(np.float32)
            for columns in (64, 32):
                for transposed in (False, True):
                    if transposed and N % columns:
                        continue  # no whole boxes
                    of_b = np.ascontiguousarray(b.T) if transposed else b
                    for left in (None, registers_of(bits_of(registers, half))):
                        name = f"wgmma_{'f16' if half else 'bf16'}_n{N}_box{columns}"
                        name += "_trans" * transposed + "_registers" * (left is not None)
                        said[name], said[f"{name}_shared"] = module.wgmma(
                            a, of_b, left, c, half, N, transposed, columns, True
                        )
    data = rng.integers(0, 1 << 16, (4, 3, 20, 96), dtype=np.uint16)
    for columns in (64, 32):
        for at in ((0, 0, 0, 0), (32, 9, 2, 3), (64, 16, 1, 1), (64, -3, 0, 2)):
            said[f"tma_box{columns}_{'_'.join(map(str, at))}"] = module.tma(data, columns, *at)
    return said


def tolerance(name):
    """Absolute and relative. Copies are exact; the order of sums and ex2's last bits are not."""
    if name.startswith(("mma", "wgmma")) and not name.endswith("shared"):
        return 2e-4, 0
    return (0, 2**-21) if name == "exp2" else (0, 0)


def build_for_gpu(folder, capability):
    arch = f"{capability}a" if capability >= HOPPER else str(capability)
    objects = []
    for name in ("wrappers", "selftest/hopper"):
        objects.append(folder / f"{Path(name).name}.o")
        flags = ["-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xcompiler=-fPIC"]
        source = ROOT / f"csrc/emulator/{name}.cu"
        subprocess.run([CUDA / "bin/nvcc", *flags, "-c", source, "-o", objects[-1]], check=True)
    includes = [Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    library = folder / "cuemu.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f"-I{i}" for i in includes] + [ROOT / "csrc/emulator/bindings.cpp", *objects]
    command += ["-o", library, f"-L{CUDA}/lib64", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


def record(folder):
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    with tempfile.TemporaryDirectory() as build:
        said = outputs(load(build_for_gpu(Path(build), capability)), capability)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{properties.name.replace(' ', '_')}.npz"
    np.savez_compressed(path, capability=capability, **said)
    return path


def compare(path, module):
    """The names of the outputs in which the emulator and the recorded GPU differ."""
    golden = np.load(path)
    said = outputs(module, int(golden["capability"]))
    missing = set(said) ^ (set(golden.files) - {"capability"})
    different = [f"{name}: only one of them has it" for name in sorted(missing)]
    for name in sorted(set(said) - missing):
        atol, rtol = tolerance(name)
        equal = np.allclose(said[name], golden[name], rtol=rtol, atol=atol, equal_nan=True)
        if not equal:
            different.append(name)
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "csrc/emulator/golden")
    parser.add_argument("mode", nargs="?", default="source")
    arguments = parser.parse_args()
    if arguments.what == "record":
        print(record(arguments.file))
    else:
        sys.path.insert(0, str(ROOT / "tools"))
        import emulator

        different = compare(arguments.file, load(emulator.modules()[arguments.mode]))
        print("\n".join(different) or "all the same")
        sys.exit(bool(different))
