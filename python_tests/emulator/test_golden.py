"""The emulator says what GPUs have said: csrc/emulator/golden, recorded by tools/golden.py.
No GPU has recorded yet, and until one has, nothing here compares with one."""

import numpy as np
import pytest

from tools import golden

RECORDED = sorted((golden.ROOT / "csrc/emulator/golden").glob("*.npz"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_emulator_says_what_the_gpu_said(module, path):
    assert golden.compare(path, module) == []


def test_a_difference_is_seen(modules, tmp_path):
    """The comparison itself, on a file made here."""
    said = golden.outputs(modules["source"], 80)
    path = tmp_path / "made.npz"
    np.savez(path, capability=80, **said)
    assert golden.compare(path, modules["source"]) == []
    said["ldmatrix"][3, 1] ^= 1
    np.savez(path, capability=80, **said)
    assert golden.compare(path, modules["source"]) == ["ldmatrix"]


@pytest.fixture(scope="module")
def of_source(modules):
    return golden.outputs(modules["source"], 90)


@pytest.mark.parametrize("mode, capability", [("check", 80), ("ptx80", 80), ("ptx90a", 90)])
def test_modes_agree_on_every_operand(of_source, modules, mode, capability):
    of_mode = golden.outputs(modules[mode], capability)
    assert of_mode.keys() <= of_source.keys()
    for name, said in of_mode.items():
        atol, rtol = golden.tolerance(name)
        np.testing.assert_allclose(
            said, of_source[name], atol=atol, rtol=rtol, equal_nan=True, err_msg=name
        )
