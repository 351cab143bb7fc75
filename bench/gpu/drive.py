"""Runs every operator on small problems, once, and compares with the CPU: for tools that watch.

    python -m bench.gpu.drive [--op NAME ...] [--kernel NAME] [--short] [--launches FILE]
                              [--rehearse]

calibrated_attention once by the kernel that it would choose, and by each one it has; --kernel asks
for one alone ("": its choice). Inputs are made on the CPU and results are read there, so that no
kernel runs but ours. --launches writes which kernels those were, as the profiler saw them.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import clock
from bench.gpu.problems import BY_KERNEL, LARGE, PROBLEMS, Problem
from bench.gpu.stages import KERNELS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.drive", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", nargs="+", default=sorted({p.op for p in PROBLEMS}))
    parser.add_argument("--kernel", choices=["", *KERNELS], help="by that alone")
    parser.add_argument("--short", action="store_true", help="bfloat16 alone")
    parser.add_argument("--launches", type=Path, help="profile, and write the kernels' names")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    a = parser.parse_args(argv)
    device = "cpu" if a.rehearse else "cuda"
    chosen = [p for p in [*PROBLEMS, *BY_KERNEL] if p.op in a.op and a.kernel in (None, p.kernel)]
    dtypes = DTYPES[:1] if a.short else DTYPES
    if a.launches is None:
        sys.exit(0 if drive(chosen, device, dtypes) else 1)
    kinds = [ProfilerActivity.CPU if a.rehearse else ProfilerActivity.CUDA]
    with profile(activities=kinds) as seen:
        right = drive(chosen, device, dtypes)
        for problem in [p for p in LARGE if p.op in a.op and not a.rehearse]:
            for dtype in DTYPES:
                problem.call(problem.arguments(device, dtype))
        clock.synchronize(device)
    names = sorted({event.name for event in seen.events()})
    a.launches.write_text("\n".join(names) + "\n")
    print(f"{len(names)} kinds of events: {a.launches}")
    sys.exit(0 if right and names else 1)


def drive(problems: Sequence[Problem], device: str, dtypes: Sequence[torch.dtype] = DTYPES) -> bool:
    right = True
    for problem in problems:
        for dtype in dtypes:
            given = problem.arguments("cpu", dtype)
            there = {k: t.to(device) if torch.is_tensor(t) else t for k, t in given.items()}
            wanted = clock.tensors(replace(problem, kernel="").call(given))
            try:
                got = [t.cpu() for t in clock.tensors(problem.call(there))]
            except RuntimeError as error:
                if not problem.kernel or "does not take this" not in str(error):
                    raise
                print(f"  {problem}  {dtype}  is not for it", flush=True)
                continue
            trouble = difference(got, wanted, dtype)
            print(f"  {problem}  {dtype}  {trouble or 'as on the CPU'}", flush=True)
            right &= trouble is None
    return right


def difference(got: list[Any], wanted: list[Any], dtype: torch.dtype) -> str | None:
    """Loosely: the tests look closer. Indices may differ where similarities nearly tie."""
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"DIFFERS: {a.dtype} {list(a.shape)}, on the CPU {b.dtype} {list(b.shape)}"
        if a.dtype.is_floating_point:
            close = torch.isclose(
                a.double(), b.double(), rtol=0, atol=32 * torch.finfo(dtype).eps, equal_nan=True
            )
            scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
            far = (~close & ~((a - b).abs() <= 1e-3 * scale)).float().mean().item()
        else:
            far = (a != b).float().mean().item()
        if far > 0.02:
            return f"DIFFERS in {far:.1%} of its elements"
    return None


if __name__ == "__main__":
    main()
