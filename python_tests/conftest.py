"""What every test run shares: one thread, no network, no chatter."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import ctypes
import sys
import zlib
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

if library := os.environ.get("RESTORE_EXT_LIBRARY"):  # another restore_ext._C: tools/lowered.py
    spec = spec_from_file_location("restore_ext._C", library)
    sys.modules["restore_ext._C"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["restore_ext._C"])

from restore_ext import ops

torch.set_num_threads(1)

# generate() takes position_ids since 5.3. Before, prepare_inputs is tested to be refused.
takes_positions = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 3)
prepares = ["test_hf_prepare_inputs.py", "test_hf_prepare_inputs_methods.py"]
collect_ignore = ["test_hf_prepare_inputs_refused.py"] if takes_positions else prepares
if find_spec("vllm") is None:
    collect_ignore.append("vllm_plugin")  # make test-vllm


def pytest_addoption(parser):
    parser.addoption(
        "--emulator",
        metavar="LIBRARY",
        help="run the CUDA kernels on the CPU: a library built by tools/emulator.py",
    )


def pytest_configure(config):
    if config.getoption("--emulator"):
        config.pluginmanager.register(Emulator(Path(config.getoption("--emulator"))))


class Emulator:
    """Puts the emulated CUDA kernels under restore_ext.ops, with their threads in random order."""

    # They test how the operators are registered, which is the same without the kernels; and what
    # stands in for the operators here cannot be compiled.
    NOT_OF_KERNELS = ("compiles", "compiled", "test_is_a_well_formed_operator", "gradient")

    def __init__(self, library: Path) -> None:
        if not library.is_file():
            mode = library.name.partition("-")[0].partition(".")[0]
            raise pytest.UsageError(f"no {library}; build it: python tools/emulator.py {mode}")
        self.from_ptx = library.name.startswith("ptx")
        os.environ["CUEMU_PTX"] = str(int(self.from_ptx))
        if self.from_ptx:
            # A device that runs this PTX: a kernel for others only has an empty body in it.
            os.environ.setdefault("CUEMU_CC", "80" if library.name.startswith("ptx80") else "90")
        torch.ops.load_library(library)
        self.control = ctypes.CDLL(str(library))
        self.control.cuemu_error.restype = ctypes.c_char_p
        ops._ops = torch.ops.restore_ext_emulated

    def ptx_launches(self) -> int:
        stats = (ctypes.c_ulonglong * 4)()
        self.control.cuemu_stats(stats)
        return stats[3]

    def pytest_collection_modifyitems(self, items):
        items[:] = [i for i in items if not any(n in i.name for n in self.NOT_OF_KERNELS)]

    def pytest_runtest_setup(self, item):
        self.control.cuemu_seed(zlib.crc32(item.name.encode()) % 1000)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """A report of the emulator fails the test, even where the test expects an error."""
        before = self.control.cuemu_reports()
        result = yield
        if self.control.cuemu_reports() > before:
            pytest.fail(f"{item.nodeid}: {self.control.cuemu_error().decode()}")
        return result

    def pytest_sessionfinish(self, session):
        if self.from_ptx and session.testscollected and not self.ptx_launches():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.from_ptx:
            count = self.ptx_launches()
            terminalreporter.write_line(f"{count} launches ran nvcc's PTX", red=not count)
