"""The emulator's wgmma and TMA against numpy, which has the PTX ISA's layouts on its own."""

import ctypes

import numpy as np
import pytest


@pytest.fixture(params=["source", "ptx90a"])
def library(modules, request):
    return ctypes.CDLL(modules[request.param].__file__)


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def rounded(x, half):
    """float32 values that the type can hold, and their bits."""
    if half:
        bits = x.astype(np.float16).view(np.uint16)
        return bits.view(np.float16).astype(np.float32), bits
    bits = ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32), bits


def accumulator_places(N):
    """Row and column of register i of thread t: figure of wgmma's D, [128, N / 2] each."""
    t, i = np.arange(128)[:, None], np.arange(N // 2)[None, :]
    row = 16 * (t // 32) + (t % 32) // 4 + 8 * ((i // 2) % 2)
    return row, 8 * (i // 4) + 2 * (t % 4) + i % 2


def registers_of_a(bits):
    """[64, K] 16-bit patterns as [K / 16, 128, 4] registers: figure of wgmma's A."""
    steps = bits.shape[1] // 16
    registers = np.zeros((steps, 128, 4), np.uint32)
    for step in range(steps):
        for t in range(128):
            row, column = 16 * (t // 32) + (t % 32) // 4, 16 * step + 2 * (t % 4)
            for i, (down, right) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
                low, high = bits[row + down, column + right : column + right + 2]
                registers[step, t, i] = int(low) | int(high) << 16
    return registers


def as_it_lies(box):
    """A [rows, columns] box of 16-bit elements under the swizzle as wide as its rows."""
    rows, columns = box.shape
    flat = np.zeros(rows * columns, np.uint16)
    for r in range(rows):
        for chunk in range(columns // 8):
            if columns == 64:  # 128 bytes: the row in a group of 8 picks among 8 chunks
                place = r * 64 + (chunk ^ r % 8) * 8
            else:  # 64 bytes: two rows share a line, the line in a group of 4 picks among 4
                place = r * 32 + (chunk ^ (r // 2) % 4) * 8
            flat[place : place + 8] = box[r, 8 * chunk : 8 * chunk + 8]
    return flat


def boxes(matrix, columns):
    return [matrix[:, c : c + columns] for c in range(0, matrix.shape[1], columns)]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("in_registers", [False, True], ids=["SS", "RS"])
@pytest.mark.parametrize("columns", [64, 32])
@pytest.mark.parametrize("transpose_b", [0, 1], ids=["K-major", "N-major"])
@pytest.mark.parametrize("N", [64, 96, 128])
@pytest.mark.parametrize("half", [0, 1], ids=["bf16", "f16"])
def test_wgmma_is_a_matrix_product(
    library, half, N, transpose_b, columns, in_registers, accumulate
):
    if transpose_b and N % columns:
        pytest.skip("boxes of 64 do not make 96 columns")
    K = 64
    rng = np.random.default_rng(N + 7 * columns + transpose_b)
    a, a_bits = rounded(rng.standard_normal((64, K), np.float32), half)
    b, b_bits = rounded(rng.standard_normal((N, K), np.float32), half)
    row, column = accumulator_places(N)
    start = rng.standard_normal((64, N)).astype(np.float32)
    registers = np.ascontiguousarray(start[row, column])
    stored = np.ascontiguousarray(b_bits.T) if transpose_b else b_bits
    shared = np.zeros(N * K * 2, np.uint8)
    of_a = registers_of_a(a_bits) if in_registers else None
    error = library.test_wgmma(
        half, N, transpose_b, columns, pointer(a_bits), pointer(stored), pointer(of_a),
        pointer(registers), pointer(shared), K // 16, int(accumulate),
    )  # fmt: skip
    assert error == 0
    lies = np.concatenate([as_it_lies(box) for box in boxes(stored, columns)])
    np.testing.assert_array_equal(shared.view(np.uint16), lies)
    expected = a.astype(np.float64) @ b.T.astype(np.float64) + accumulate * start
    np.testing.assert_allclose(registers, expected[row, column], rtol=0, atol=2e-4)


@pytest.mark.parametrize("columns", [64, 32])
@pytest.mark.parametrize("layout", ["BHLD", "BLHD", "gaps"])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (32, 9, 2, 3), (64, 16, 1, 1), (64, -3, 0, 2)])
def test_tma_reads_a_view_in_place(library, columns, layout, at):
    """Boxes of 16 rows of a [4, 3, 20, 96] view; outside it are zeros."""
    rng = np.random.default_rng(0)
    memory = rng.integers(1, 1 << 16, 4 * 3 * 20 * 96 * 2, dtype=np.uint16)
    line, head, image = {
        "BHLD": (96, 20 * 96, 3 * 20 * 96),
        "BLHD": (3 * 96, 96, 20 * 3 * 96),
        "gaps": (104, 21 * 104, 3 * 21 * 104 + 8),
    }[layout]
    strides = np.array([line * 2, head * 2, image * 2], np.uint64)
    out = np.zeros(16 * columns * 2, np.uint8)
    error = library.test_tma(pointer(memory), pointer(strides), columns, pointer(out), *at)
    assert error == 0
    box = np.zeros((16, columns), np.uint16)
    for r in range(16):
        for c in range(columns):
            if 0 <= at[1] + r < 20 and at[0] + c < 96:
                start = at[3] * image + at[2] * head + (at[1] + r) * line
                box[r, c] = memory[start + at[0] + c]
    np.testing.assert_array_equal(out.view(np.uint16), as_it_lies(box))
