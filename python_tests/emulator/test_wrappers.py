"""The device wrappers against numpy, which reads the PTX ISA's figures on its own."""

import numpy as np
import pytest

from tools.golden import bits_of, registers_of

LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4  # as the figures call them


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_out_four_matrices(module, rng, transposed):
    rows = rng.integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    got = module.ldmatrix(rows, transposed)
    for m in range(4):
        matrix = rows[8 * m : 8 * m + 8]
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            low, high = matrix[lane // 4, 2 * (lane % 4) :][:2]
            assert got[lane, m] == int(low) | int(high) << 16


def fragments(a, b):
    """a [16, 16] and b [16, 8] as what each lane holds of them (mma.m16n8k16, .row.col)."""
    rows = np.stack([GROUP, GROUP + 8, GROUP, GROUP + 8], 1)
    columns = np.stack([2 * THREAD, 2 * THREAD, 2 * THREAD + 8, 2 * THREAD + 8], 1)
    left = np.stack([a[rows, columns], a[rows, columns + 1]], -1)
    depth = np.stack([2 * THREAD, 2 * THREAD + 8], 1)
    right = np.stack([b[depth, GROUP[:, None]], b[depth + 1, GROUP[:, None]]], -1)
    return left, right


@pytest.mark.parametrize("half", [False, True], ids=["bf16", "f16"])
def test_mma_is_a_matrix_product(module, rng, half):
    a, b = rng.integers(-8, 9, (16, 16)) / 4, rng.integers(-8, 9, (16, 8)) / 4  # exact in both
    c = rng.standard_normal((16, 8)).astype(np.float32)
    rows = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8], 1)
    columns = np.stack([2 * THREAD, 2 * THREAD + 1] * 2, 1)
    left, right = (registers_of(bits_of(x, half))[..., 0] for x in fragments(a, b))
    d = module.mma(left, right, c[rows, columns], half)
    np.testing.assert_allclose(d, (a @ b + c)[rows, columns], atol=1e-5)


def test_mma_tells_its_two_types_apart(module):
    one = np.uint32(0x3F803F80)  # two 1s in bfloat16, two 1.875s in float16
    a, b, c = np.full((32, 4), one), np.full((32, 2), one), np.zeros((32, 4), np.float32)
    assert (module.mma(a, b, c, False) == 16).all()
    assert (module.mma(a, b, c, True) == 16 * 1.875**2).all()


def test_cp_async_copies_or_clears(module, rng):
    data = rng.integers(1, 256, (2, 32, 16), dtype=np.uint8)
    valid = rng.integers(0, 2, (2, 32), dtype=np.uint8)
    np.testing.assert_array_equal(module.cp_async(data, valid), data * valid[..., None])


def test_exp2(module):
    x = np.linspace(-126, 127, 1001).astype(np.float32)
    np.testing.assert_allclose(module.exp2(x), np.exp2(x.astype("f8")), rtol=3e-7)
    ends = np.array([-np.inf, -150, -127.5, np.inf, 128], np.float32)  # .ftz: no denormals
    np.testing.assert_array_equal(module.exp2(ends), [0, 0, 0, np.inf, np.inf])
    assert np.isnan(module.exp2(np.array([np.nan], np.float32)))


def test_arguments_are_checked(modules):
    with pytest.raises(ValueError, match="rows must have 256 elements, got 8"):
        modules["source"].ldmatrix(np.zeros(8, np.uint16), False)
