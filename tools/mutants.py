"""What a planted bug is, and those in the wrappers of instructions, for tools/mutate_kernels.py."""

from dataclasses import dataclass

WRAPPERS = "python_tests/emulator/test_wrappers.py"
GOLDEN = "python_tests/emulator/test_golden.py"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # exact text; every occurrence is replaced
    new: str
    tests: str  # a test file
    subset: str = ""  # pytest -k
    modes: tuple[str, ...] = ("check",)  # each of these must catch it
    only: tuple[str, ...] = ()  # tools/emulator.py --only; nothing for the emulator's own tests


def in_ptx(name: str, old: str, new: str, subset: str) -> Mutant:
    """Inside inline PTX: the C++ twin does not see it, nvcc's PTX must."""
    return Mutant(name, "csrc/cuda/ptx.cuh", old, new, WRAPPERS, subset, ("ptx80",))


def in_hopper(name: str, old: str, new: str) -> Mutant:
    return Mutant(
        name, "csrc/cuda/hopper.cuh", old, new, GOLDEN, "modes_agree and ptx90a", ("ptx90a",)
    )


INSTRUCTIONS = [
    in_ptx(
        "mma: registers of A change places",
        '"r"(a[1]), "r"(a[2])',
        '"r"(a[2]), "r"(a[1])',
        "mma",
    ),
    in_ptx("mma: registers of B change places", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', "mma"),
    in_ptx("mma: f16 taken for bf16", "f32.f16.f16.f32", "f32.bf16.bf16.f32", "mma"),
    in_ptx("ldmatrix: .trans dropped", "x4.trans.shared", "x4.shared", "ldmatrix"),
    in_ptx(
        "ldmatrix: registers in another order",
        "{%0,%1,%2,%3}, [%4]",
        "{%0,%2,%1,%3}, [%4]",
        "ldmatrix",
    ),
    in_ptx("cp.async: 8 of 16 bytes", "valid ? 16 : 0", "valid ? 8 : 0", "cp_async"),
    in_ptx("cp.async: no zeros", '"r"(valid ? 16 : 0)', '"r"(16)', "cp_async"),
    in_ptx("cp.async: waits for one group too few", '"n"(N)', '"n"(N + 1)', "cp_async"),
    in_ptx("cp.async: group never closed", '"cp.async.commit_group;\\n"', '""', "cp_async"),
    in_ptx("exp2: another function", "ex2.approx.ftz", "lg2.approx.ftz", "exp2"),
    in_ptx("exp2: keeps denormals", "ex2.approx.ftz", "ex2.approx", "exp2"),
    in_hopper("TMA: coordinates change places", "{%3, %4, %5, %6}", "{%4, %3, %5, %6}"),
    in_hopper(
        "mbarrier: bytes not expected",
        "arrive.expect_tx.shared::cta.b64 _, [%0], %1",
        "arrive.shared::cta.b64 _, [%0]",
    ),
    in_hopper("mbarrier: waits for the other phase", "p, [%0], %1;", "p, [%0], 1;"),
    in_hopper("wgmma: A and B change places", ", %32, %33, p, 1", ", %33, %32, p, 1"),
    in_hopper("wgmma: B never transposed", "p, 1, 1, 0, %35", "p, 1, 1, 0, 0"),
    in_hopper(
        "wgmma: registers of A change places", "{%32, %33, %34, %35}", "{%32, %34, %33, %35}"
    ),
    in_hopper("wgmma: starts from nothing", "setp.ne.b32 p, %34, 0", "setp.ne.b32 p, 0, 0"),
]
