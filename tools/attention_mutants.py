"""Bugs in the kernels of attention's prefill, the portable one and Hopper's, for
tools/mutate_kernels.py: each is caught by the tests that force its kernel, emulated."""

from mutants import Mutant

PORTABLE = "calibrated_attention_prefill_kernel.cu"
HOPPER, TILES = "calibrated_attention_hopper_kernel.cu", "attention_hopper_tiles.cuh"


def bug(name: str, old: str, new: str, file: str = HOPPER, mode: str = "source") -> Mutant:
    kernel = "hopper" if "hopper" in file else "prefill"
    quick = f"{kernel} and (not float16 or bfloat16) and not 96 and not 128 and not every_run"
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


PREFILL_KERNELS = [
    bug(
        "sums keep the old maximum's scale",
        "sum[r] = fmaf(sum[r], keep, even + odd);",
        "sum[r] += even + odd;",
        PORTABLE,
    ),
    bug(
        "sizes are left out of odd columns",
        "e % 2 ? size.y : size.x",
        "e % 2 ? 0.f : size.x",
        PORTABLE,
    ),
    bug(
        "rows of the lower half see the upper's keys",
        "const KeyRange own = e < 2 ? upper : lower;",
        "const KeyRange own = upper;",
        PORTABLE,
    ),
    bug(
        "a strip begins one distance late",
        "rho += decay_at(p, g, low + e + shift);",
        "rho += decay_at(p, g, low + e + shift + 1);",
        "attention_distance.cuh",
    ),
    race(
        "does not wait for the tile",
        "    cp_async_wait<0>();\n    __syncthreads();  // this tile",
        "    __syncthreads();  // this tile",
        PORTABLE,
    ),
    race(
        "no barrier before a stage is overwritten",
        "__syncthreads();  // this tile is there for all",
        "// this tile is there for all",
        PORTABLE,
    ),
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
