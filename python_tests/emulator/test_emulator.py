"""The emulator runs what is right and names what is wrong, in every mode."""

import numpy as np
import pytest

SLOTS = 200
OPERANDS = np.dtype(
    [(n, "f4") for n in "fgh"]
    + [("gap", "f4")]
    + [(n, "f8") for n in "de"]
    + [(n, "u4") for n in "uvw"]
    + [(n, "i4") for n in "ijk"]
    + [(n, "u8") for n in "qr"]
    + [(n, "i8") for n in "st"]
)

# What a report must say. Values betray the others, or the checker alone can see them.
NAMED_BY_THE_CHECKER = {
    "race_shared": "race: read of shared",
    "race_global": "race: write of out",
    "race_between_warps": "race: read of shared",
    "out_of_bounds": "out of bounds: write of memory after the end of out",
    "out_of_bounds_shared": "out of bounds: write of memory after the end of shared",
    "uninitialised_shared": "uninitialised read: read of shared +20",
    "uninitialised_output": "uninitialised read: read of out",
    "copy_not_waited_for": "cp.async destination used before its wait: read of shared",
    "copy_without_barrier": "race: ",
    "last_block_no_release": "race: read of parts",
    "last_block_no_acquire": "race: read of parts",
    "last_block_no_barrier": "race: read of parts",
}
NAMED_IN_EVERY_MODE = {
    "copy_left_open": "thread exited with cp.async copies not waited for",
    "misaligned": "misaligned",
    "divergent_barrier": "(divergent barrier)",
    "exit_before_barrier": "1 threads of the block exited before the barrier",
    "missing_lane": "deadlock: no thread can run",
    "exited_lane": "names exited or absent lanes",
    "endless_wait": "livelock",
    "too_many_threads": "1056 threads",
    "too_much_shared": "a block cannot have 307200 bytes of shared memory",
    "grid_too_high": "launch refused: 64 threads, grid 1 x 65536 x 1",
}
NAMED_FROM_PTX = {"more_than_launch_bounds": "more threads than __launch_bounds__"}
RIGHT = ("last_block", "last_block_all_fence")


def operands(count=64):
    rng = np.random.default_rng(0)
    o = np.zeros(count, OPERANDS)
    for name in "fghde":
        o[name] = rng.standard_normal(count) * 10
    for name in "uvwijkqrst":
        low, high = np.iinfo(o[name].dtype).min, np.iinfo(o[name].dtype).max
        o[name] = rng.integers(low, high, count, o[name].dtype, endpoint=True)
    return o


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_works_works(module, seed):
    module.seed(seed)
    assert module.checks() == 0, module.last_error()


def test_functions_say_the_same_in_every_mode(module, modules):
    exact, approximate = module.functions(operands(), SLOTS)
    of_source = modules["source"].functions(operands(), SLOTS)
    said = int(exact[0, -1])
    assert said > 150
    np.testing.assert_array_equal(exact[:, :said], of_source[0][:, :said])
    said = int(approximate[0, -1])
    assert said > 20
    np.testing.assert_allclose(approximate[:, :said], of_source[1][:, :said], rtol=1e-6)


def test_functions_are_those_of_numpy(module):
    """A few, spelt out, so that both modes cannot be wrong together in all of them."""
    o = operands()
    exact, approximate = module.functions(o, SLOTS)
    f, g = o["f"], o["g"]
    first = [
        (f.astype("f8") * g + o["h"]).astype("f4"),  # __fmaf_rn: rounded once (twice, in double)
        f * g + o["h"],
        f - g,
        f / g,
        np.sqrt(np.abs(f)),
    ]
    for slot, expected in enumerate(first):
        got = exact[:, slot].astype(np.uint32).view("f4")
        np.testing.assert_allclose(got, expected, rtol=1e-7)
    np.testing.assert_allclose(approximate[:, 0], np.exp(f.astype("f8")), rtol=1e-6)
    np.testing.assert_allclose(approximate[:, 1], np.exp2(f.astype("f8")), rtol=1e-6)


@pytest.mark.parametrize("name", [*NAMED_BY_THE_CHECKER, *RIGHT])
def test_the_checker_names_a_fault(modules, name):
    report = modules["check"].fault(name)
    expected = NAMED_BY_THE_CHECKER.get(name, "")
    assert expected in report
    assert (report == "") == (name in RIGHT)
    if ":" in expected:
        assert "faults.cu:" in report  # and where it is


@pytest.mark.parametrize("name", NAMED_IN_EVERY_MODE)
@pytest.mark.parametrize("mode", ["source", "check", "ptx80", "ptx90a"])
def test_every_mode_names_a_fault(modules, mode, name):
    report = modules[mode].fault(name)
    assert NAMED_IN_EVERY_MODE[name] in report
    if name in ("divergent_barrier", "exit_before_barrier", "endless_wait"):
        assert "faults.cu:" in report


@pytest.mark.parametrize("mode", ["ptx80", "ptx90a"])
@pytest.mark.parametrize("name", NAMED_FROM_PTX)
def test_ptx_names_a_fault(modules, mode, name):
    assert NAMED_FROM_PTX[name] in modules[mode].fault(name)


def test_the_performance_report_counts_conflicts(modules, monkeypatch):
    monkeypatch.setenv("CUEMU_PERF", "1")
    modules["check"].ldmatrix(np.zeros((32, 8), np.uint16), False)
    report = modules["check"].perf_report()
    assert "wavefronts per ideal 1.00" in report
    assert "wrappers.cu:" in report
