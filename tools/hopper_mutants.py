"""Bugs in Hopper's attention kernel, for tools/mutate_kernels.py: each is caught by the tests that
force it, run on the emulated kernel."""

from mutants import Mutant

HOPPER, TILES = "calibrated_attention_hopper_kernel.cu", "attention_hopper_tiles.cuh"


def in_hopper(name: str, old: str, new: str, file: str = HOPPER, mode: str = "source") -> Mutant:
    return Mutant(
        name,
        f"csrc/cuda/{file}",
        old,
        new,
        "python_tests/test_calibrated_attention_kernels.py",
        "hopper and not float16 and not 96 and not 128 and not every_run",
        (mode,),
        ("calibrated_attention",),
    )


HOPPER_KERNEL = [
    in_hopper("sums keep the old maximum's scale", "o[i] *= keep[i >> 1 & 1];", "o[i] *= 1.f;"),
    in_hopper("the scores are not waited for", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    in_hopper("values are free before they are cleared", "4 * kGroups + 1);", "4 * kGroups);"),
    in_hopper(
        "a stage is overwritten while it is read",
        "return parity(t) ^ 1;",
        "return parity(t);",
        TILES,
    ),
    in_hopper(
        "zeros that wgmma does not see",
        "      fence_proxy_async();  // wgmma reads what was stored here\n",
        "",
        TILES,
    ),
    in_hopper(
        "padding's values are read before they are cleared",
        "    if (has_padding) mbar_wait(barriers.cleared(stage), parity(t));\n",
        "",
    ),
    in_hopper(
        "keys past what the block sees count",
        "if (key >= range.past && key < p.Lk) log_size = kNever;",
        "",
        TILES,
    ),
]
