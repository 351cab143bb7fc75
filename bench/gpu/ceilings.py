"""What the GPU at hand can do at most: copy bandwidth, bf16 matmul rate, launch latency.

    python -m bench.gpu.ceilings [--rehearse] [--keep] [--results FOLDER]

Random data: a matmul of zeros runs faster than any real one.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import clock
from bench.clock import Call
from bench.machine import driver, machine
from bench.rows import Rows

RESULTS = Path(__file__).parent.parent / "results"
ROUNDS = 20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ceilings", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--keep", action="store_true", help="append to RESULTS/<machine>.csv")
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args(argv)
    device = "cpu" if a.rehearse else "cuda"
    print(f"ceilings of {machine(device)}, torch {torch.__version__}, driver {driver() or 'none'}")
    rows = [*copies(device), *matmuls(device), *launches(device)]
    for row in rows:
        print("  {case:<28} {us:>12} us  {tflops:>8} TFLOP/s  {gbs:>8} GB/s".format(**row))
    if a.keep:
        Rows(a.results, device).add(rows)


def copies(device: str) -> list[dict[str, Any]]:
    gpu = clock.is_cuda(device)
    rows = []
    for mib in (64, 1024, 4096) if gpu else (1,):
        source = torch.randint(256, (mib << 20,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = median(partial(target.copy_, source), device)
        rows.append(row(f"copy {mib} MiB", "uint8", seconds, moved=2 * source.numel()))
        assert torch.equal(source, target)
    return rows


def matmuls(device: str) -> list[dict[str, Any]]:
    rows = []
    for n in (1024, 4096, 8192) if clock.is_cuda(device) else (64,):
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        seconds = median(partial(torch.mm, a, b), device)
        rows.append(row(f"matmul {n}", "bfloat16", seconds, operations=2 * n**3))
    return rows


def launches(device: str) -> list[dict[str, Any]]:
    """The smallest kernel there is: called one after the other, and in a graph."""
    x = torch.ones(1, device=device)
    fn = partial(x.mul_, 1)
    calls = [clock.loop_seconds(fn, device) for _ in range(ROUNDS)]
    replay = clock.Replay([fn] * 100, device)
    replays = [replay.seconds() for _ in range(ROUNDS)]
    return [
        row("launch, call after call", "float32", statistics.median(calls)),
        row("launch, in a graph of 100", "float32", statistics.median(replays)),
    ]


def median(fn: Call, device: str) -> float:
    once = clock.between_events if clock.is_cuda(device) else partial(clock.cpu_seconds, wall)
    for _ in range(3):
        fn()
    return statistics.median(once(fn) for _ in range(ROUNDS))


wall = time.perf_counter


def row(
    case: str, dtype: str, seconds: float, operations: float = 0, moved: float = 0
) -> dict[str, Any]:
    rates = {"tflops": operations / seconds / 1e12, "gbs": moved / seconds / 1e9}
    said = {name: round(rate, 2) if rate else "" for name, rate in rates.items()}
    name = {"op": "ceiling", "case": case, "dtype": dtype, "provider": "torch"}
    return name | {"us": round(1e6 * seconds, 2)} | said


if __name__ == "__main__":
    main()
