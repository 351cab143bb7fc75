"""Bugs in Hopper's attention kernel, for tools/mutate_kernels.py: each is caught by the tests that
force it, run on the emulated kernel."""

from mutants import Mutant

HOPPER, TILES = "calibrated_attention_hopper_kernel.cu", "attention_hopper_tiles.cuh"


def bug(name: str, old: str, new: str, file: str = HOPPER, mode: str = "source") -> Mutant:
    quick = "hopper and (not float16 or bfloat16) and not 96 and not 128 and not every_run"
    return Mutant(
        name,
        f"csrc/cuda/{file}",
        old,
        new,
        "python_tests/test_calibrated_attention_kernels.py",
        quick + " and (window or gives_zero or reads_no_key)" * (mode == "check"),
        (mode,),
        ("calibrated_attention",),
    )


def race(name: str, old: str, new: str, file: str = HOPPER) -> Mutant:
    """Only who watches every access sees it for sure."""
    return bug(name, old, new, file, "check")


HOPPER_KERNEL = [
    bug("sums keep the old maximum's scale", "o[i] *= keep[i >> 1 & 1];", "o[i] *= 1.f;"),
    bug("the scores are not waited for", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    bug("values are free before they are cleared", "4 * kGroups + 1);", "4 * kGroups);"),
    bug(
        "a stage is overwritten while it is read",
        "return parity(t) ^ 1;",
        "return parity(t);",
        TILES,
    ),
    race(
        "zeros that wgmma does not see",
        "      fence_proxy_async();  // wgmma reads what was stored here\n",
        "",
        TILES,
    ),
    race(
        "padding's values are read before they are cleared",
        "    if (has_padding) mbar_wait(barriers.cleared(stage), parity(t));\n",
        "",
    ),
    bug(
        "keys past what the block sees count",
        "if (key >= range.past && key < p.Lk) log_size = kNever;",
        "",
        TILES,
    ),
]
