"""The emulator's own modules, built once a run, one for every mode. See docs/emulator.md."""

import os
import shutil

import pytest

from tools import emulator, golden


class Modules(dict):
    def __missing__(self, mode):
        pytest.skip(f"CUEMU_MODES leaves {mode} out")


@pytest.fixture(scope="session")
def modules():
    if not (emulator.CUDA / "bin/nvcc").exists() or not shutil.which("g++"):
        pytest.skip("no CUDA toolkit, or no g++")
    os.environ["CUEMU_PTX"] = "1"  # where a module holds PTX, run that
    return Modules({mode: golden.load(path) for mode, path in emulator.modules().items()})


@pytest.fixture(params=emulator.MODES)
def mode(request):
    return request.param


@pytest.fixture
def module(modules, mode):
    """One mode's module. In a PTX mode, PTX it must have been."""
    chosen = modules[mode]
    before = chosen.stats()["ptx_launches"]
    yield chosen
    chosen.seed(0)
    chosen.unregister()
    assert mode.startswith("ptx") == (chosen.stats()["ptx_launches"] > before)
