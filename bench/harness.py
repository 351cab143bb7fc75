"""Times providers of one op side by side, prints a line each, and with --keep writes them down.

Right first, fast second: every provider's answer passes the check of the tests before the clock
starts. Then the providers take turns, so that a machine that slows down slows all of them. On a CPU
the clock is the thread's own time on one thread, which neighbours do not disturb (--threads N: wall
time); on a GPU it is events around a call with a cold L2.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from restore_ext.testing import DEVICES

RESULTS = Path(__file__).parent / "results"
Provider = Callable[..., Any]


class Case(Protocol):
    """A problem: its str is its name in the table."""

    def arguments(self, device: str, dtype: torch.dtype) -> dict[str, Any]: ...


def main(
    op: str,
    cases: Sequence[Case],
    providers: dict[str, Provider],
    check: Callable[..., None],
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> None:
    """Times `provider(**arguments)`; the first provider is the one the others are held against.

    `check(result, **arguments)` raises if an answer is wrong.
    """
    parser = argparse.ArgumentParser(description=f"Times {op}.")
    parser.add_argument("--device", default=DEVICES[-1], choices=DEVICES)
    parser.add_argument("--dtype", nargs="+", default=dtypes, help="names of torch dtypes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="about, for a provider of a case"
    )
    parser.add_argument("--keep", action="store_true", help="append to results/<machine>.csv")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    print(f"{op} on {machine(args.device)}, torch {torch.__version__}, {args.threads} thread(s)")
    for case in cases:
        for dtype in args.dtype:
            arguments = case.arguments(args.device, getattr(torch, dtype))
            for fn in providers.values():
                check(fn(**arguments), **arguments)
            calls = {name: partial(fn, **arguments) for name, fn in providers.items()}
            timer = cuda_seconds if args.device == "cuda" else partial(cpu_seconds, clock)
            for row in compare(calls, timer, args.seconds):
                row = {"op": op, "case": str(case), "dtype": dtype} | row
                print("  {case}  {dtype}  {provider:<14} {us:>10} us".format(**row), end="")
                print("  ({us_p20} to {us_p80})  {speedup}x".format(**row))
                if args.keep:
                    keep(row, args.device, args.threads)


def compare(
    calls: dict[str, Callable[[], Any]],
    timer: Callable[[Callable[[], Any]], float],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Rounds in which every provider runs once, until each has had its seconds."""
    slowest = max(timer(fn) for fn in calls.values() for _ in range(2))  # warms up, too
    rounds = max(7, min(500, int(seconds / slowest)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, fn in calls.items():
            times[name].append(timer(fn))
    baseline = statistics.median(next(iter(times.values())))
    for name, seen in times.items():
        p20, _, _, p80 = statistics.quantiles(seen, n=5)
        median = statistics.median(seen)
        yield {
            "provider": name,
            "us": round(1e6 * median, 1),
            "us_p20": round(1e6 * p20, 1),
            "us_p80": round(1e6 * p80, 1),
            "speedup": round(baseline / median, 2),
        }


def cpu_seconds(clock: Callable[[], float], fn: Callable[[], Any]) -> float:
    start = clock()
    fn()
    return clock() - start


def cuda_seconds(fn: Callable[[], Any]) -> float:
    torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()  # larger than any L2
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def keep(row: dict[str, Any], device: str, threads: int) -> None:
    """A number without its machine, its torch and its commit is a rumour."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    row = row | {"threads": threads, "torch": torch.__version__, "commit": commit.stdout.strip()}
    path = RESULTS / f"{'_'.join(machine(device).split())}.csv"
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
