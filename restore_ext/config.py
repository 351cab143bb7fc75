"""Facts about this build and this machine, for bug reports."""

import os
import platform

import torch

from restore_ext import _C


def cpu_level() -> str:
    """The level of the CPU kernels in use: the one RESTORE_EXT_CPU names, or the best there is."""
    return os.environ.get("RESTORE_EXT_CPU") or _C.cpu_levels.split()[-1]


def show_config() -> None:
    """Prints what this build was made with and what it runs on, one fact a line."""
    from restore_ext import __version__

    archs = _C.cuda_archs or "none (CPU build)"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "restore_ext": __version__,
        "library": _C.__file__,
        "compiler": _C.compiler,
        "ABI": f"LibTorch stable, torch >= {_C.torch_target}; Python abi3",
        "CUDA archs": archs,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})",
        "Python": platform.python_version(),
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "CPU features in use": cpu_level(),
        "CPU offers": torch.backends.cpu.get_cpu_capability(),
        "GPU": gpu,
    }
    print("\n".join(f"{name:<20} {value}" for name, value in facts.items()))
