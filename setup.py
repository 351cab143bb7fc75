"""Builds restore_ext._C on the LibTorch stable ABI: one library, Python >= 3.10, torch >= 2.11.

CPU torch               the CPU operators
CUDA torch and nvcc     the CPU and CUDA operators
RESTORE_EXT_CUDA=1      the CUDA operators even on a CPU torch: the library then runs under a CUDA
                        torch elsewhere. RESTORE_EXT_CUDA=0 leaves them out.

Kernels see no torch, so plain nvcc compiles them, the same under any torch: CUDA_HOME says which,
TORCH_CUDA_ARCH_LIST for which architectures, MAX_JOBS how many at once.
(9.0 is built as 9.0a: restore_ext/archs.py.)
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

# The PTX is for a GPU that none of the others is for: 10.3, or newer ones.
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX 9.0a 10.0a 12.0"
TORCH_TARGET = "2.11"  # the oldest torch the library runs under
HOME = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")

forced = os.environ.get("RESTORE_EXT_CUDA")
has_nvcc = (HOME / "bin/nvcc").exists()
if forced == "1" and not has_nvcc:
    raise SystemExit(f"RESTORE_EXT_CUDA=1 needs the CUDA toolkit: no bin/nvcc in CUDA_HOME={HOME}")
with_cuda = forced == "1" or (forced != "0" and torch.version.cuda is not None and has_nvcc)

# An op is found by where it stands; there is no list to keep.
folders = ["csrc", "csrc/cpu", *(["csrc/cuda"] if with_cuda else [])]
sources = sorted(str(p) for f in folders for p in Path(f).glob("*.cpp"))
major, minor = map(int, TORCH_TARGET.split("."))


archs: list[str] = []
rules = runpy.run_path("restore_ext/archs.py")
if with_cuda:
    try:
        archs, notes = rules["wanted"](ARCHS)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for note in notes:
        print(f"TORCH_CUDA_ARCH_LIST: {note}")


def gencode(kernel: Path) -> str:
    """What a kernel is compiled for: all, or those that its line `// Architectures: 90a` names."""
    named = re.search(r"^// Architectures: (.+)$", kernel.read_text(), re.MULTILINE)
    return rules["gencode"](archs, named[1].split() if named else None)


def compile_kernels() -> list[str]:
    """Objects of all kernels, those that changed compiled anew."""
    flags = "-O3 -std=c++17 -lineinfo -compress-mode=size -Xcompiler=-fPIC,-fvisibility=hidden"
    lines = [
        "builddir = build/cuda",
        "rule nvcc",
        f"  command = {HOME}/bin/nvcc {flags} $gencode -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for kernel in sorted(Path("csrc/cuda").glob("*.cu")):
        objects.append(f"build/cuda/{kernel.stem}.o")
        lines += [f"build {objects[-1]}: nvcc {kernel}", f"  gencode = {gencode(kernel)}"]
    plan = Path("build/cuda/build.ninja")
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    subprocess.check_call([sys.executable, "-m", "ninja", "--quiet", "-j", jobs, "-f", str(plan)])
    return objects


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles the kernels, too, when it comes to building."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/objects"  # pip's would be gone with every object; these are kept

    def build_extensions(self) -> None:
        if with_cuda:
            self.extensions[0].extra_objects = compile_kernels()
        super().build_extensions()


extension = cpp_extension.CppExtension(
    "restore_ext._C",
    sources,
    py_limited_api=True,
    define_macros=[
        ("TORCH_TARGET_VERSION", f"0x{major << 56 | minor << 48:016x}"),
        ("RESTORE_EXT_TORCH_TARGET", f'"{TORCH_TARGET}"'),
        ("RESTORE_EXT_CUDA_ARCHS", f'"{" ".join(archs)}"'),
    ],
    # The entries read the toolkit's types, and the profiler's ranges its NVTX, where it is there.
    include_dirs=[str(HOME / "include")] if (HOME / "include").exists() else [],
    extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall"],
    extra_link_args=["-Wl,--exclude-libs,ALL"],
    library_dirs=[str(HOME / "lib64")] if with_cuda else [],
    libraries=[*(["cudart_static", "rt"] if with_cuda else []), "dl"],
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
