"""Builds restore_ext._C on the LibTorch stable ABI: one library, Python >= 3.10, torch >= 2.11.

CPU torch               the CPU operators
CUDA torch and nvcc     the CPU and CUDA operators
RESTORE_EXT_CUDA=1      the CUDA operators even on a CPU torch, by plain nvcc: the library then runs
                        under a CUDA torch elsewhere.  RESTORE_EXT_CUDA=0 leaves them out.
TORCH_CUDA_ARCH_LIST picks the architectures.
"""

import os
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 9.0a 10.0a 12.0")
TORCH_TARGET = "2.11"  # the oldest torch the library runs under

kernels = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
forced = os.environ.get("RESTORE_EXT_CUDA")
cuda_torch = torch.version.cuda is not None
with_cuda = bool(kernels) and (forced == "1" or (cuda_torch and forced != "0"))
home = os.environ.get("CUDA_HOME", "/usr/local/cuda")

# An op is found by where it stands; there is no list to keep.
folders = ["csrc", "csrc/cpu", *(["csrc/cuda"] if with_cuda else [])]
sources = sorted(str(p) for f in folders for p in Path(f).glob("*.cpp"))
major, minor = map(int, TORCH_TARGET.split("."))
macros = [
    ("TORCH_TARGET_VERSION", f"0x{major << 56 | minor << 48:016x}"),
    ("RESTORE_EXT_TORCH_TARGET", f'"{TORCH_TARGET}"'),
    ("RESTORE_EXT_CUDA_ARCHS", f'"{ARCHS if with_cuda else ""}"'),
]
common = {"py_limited_api": True, "define_macros": macros}
flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall"]
NVCC = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def plain_nvcc() -> list[str]:
    """Compiles the kernels without a CUDA torch, which cpp_extension would ask for."""
    build = Path("build/plain")
    build.mkdir(parents=True, exist_ok=True)
    codes = [a.replace(".", "") for a in ARCHS.replace(";", " ").split()]
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in codes]
    objects = []
    for kernel in kernels:
        objects.append(str(build / f"{Path(kernel).stem}.o"))
        subprocess.check_call(
            [f"{home}/bin/nvcc", *NVCC, *gencode, "-c", kernel, "-o", objects[-1]]
        )
    return objects


if with_cuda and cuda_torch:
    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHS  # torch cannot guess it without a GPU
    cpp_extension.CUDA_HOME = home  # torch's own guess may be a wrapper script's folder
    compile_args = {"cxx": flags, "nvcc": NVCC}
    extension = cpp_extension.CUDAExtension(
        "restore_ext._C", sources + kernels, extra_compile_args=compile_args, **common
    )
else:
    if with_cuda:
        common |= {
            "extra_objects": plain_nvcc(),
            "extra_link_args": ["-Wl,--exclude-libs,ALL"],
            "library_dirs": [f"{home}/lib64"],
            "libraries": ["cudart_static", "rt", "dl"],
        }
    extension = cpp_extension.CppExtension(
        "restore_ext._C", sources, extra_compile_args={"cxx": flags}, **common
    )

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
