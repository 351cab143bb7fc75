"""What tools/cuda_check.py asks of a compiled kernel: every instance has it, and there is one."""

from tools.cuda_check import FLOAT, HALF, Expected, Kernel, missing


def kernel(name, *opcodes, registers=64):
    return Kernel(name, 0, 0, registers, 0, list(opcodes))


def test_every_instance_must_hold_what_is_expected():
    half = Expected("file", "some_kernel" + HALF, ("HMMA",))
    good = kernel("some_kernel<Tile<__half, 64>, __half>", "HMMA")
    bad = kernel("some_kernel<Tile<__nv_bfloat16, 64>, __nv_bfloat16>", "FFMA")
    plain = kernel("some_kernel<Tile<float, 64>, float>", "FFMA")
    assert missing(half, [good, plain]) == []
    assert missing(half, [good, bad, plain]) == [f"{bad.name}: no HMMA"]
    assert missing(half, [plain]) == [f"no kernel is named {half.name}"]
    assert missing(Expected("file", "some_kernel" + FLOAT, ("FFMA",)), [good, plain]) == []


def test_registers_are_exactly_what_is_expected():
    exact = Expected("file", "k<.*, 2>", (), 168)
    ours = [kernel("k<__half, 64, 2>", registers=168), kernel("k<__half, 64, 1>", registers=128)]
    assert missing(exact, ours) == []
    for other in (160, 176):
        wrong = kernel("k<__half, 96, 2>", registers=other)
        assert missing(exact, [*ours, wrong]) == [f"{wrong.name}: {other} registers, not 168"]
