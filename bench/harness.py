"""Times providers of one op side by side, prints a line each, and with --keep writes them down.

Right first, fast second: every provider's answer passes the check of the tests before the clock
starts. Then the providers take turns, so that a machine that slows down slows all of them. How:

thread   on a CPU: the thread's own time on one thread, which neighbours do not disturb
wall     on a CPU with --threads N: wall time
call     on a GPU: events around one call with a cold L2
loop     on a GPU: host time of calls one after the other, which an eager caller waits
graph    on a GPU, where a call takes under 50 us: replays of a CUDA graph of such calls, over the
         same inputs (warm L2) and over copies of them larger than the L2 (cold)

A provider that cannot run here, fails or is wrong has a row that says so. Where that is ours, or
anyone on the CPU, the exit status is 1 at the end. --rehearse runs what is meant for a GPU on the
CPU, on tiny problems, so that a typo shows before there is one.
"""

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import clock
from bench.clock import Call
from bench.machine import machine
from bench.provider import OURS, PARTIAL, Given, Missing, Peer, Provider, as_peer
from bench.rows import Rows
from restore_ext.testing import DEVICES

__all__ = ["OURS", "Gpu", "Peer", "machine", "main"]
SHORT = 50e-6  # seconds; below, launching dominates, and a graph is timed as well
ROUNDS = 500


class Case(Protocol):
    """A problem: its str is its name in the table."""

    def arguments(self, device: str, dtype: torch.dtype) -> Given: ...


@dataclass(frozen=True)
class Gpu:
    """What a bench has for a GPU beside, or instead of, what it has for a CPU."""

    cases: Sequence[Any]
    rehearsal: Sequence[Any]  # tiny cases for --rehearse
    providers: dict[str, Provider] = field(default_factory=dict)
    dtypes: Sequence[str] = ("bfloat16",)


@dataclass(frozen=True)
class Bench:
    op: str
    check: Callable[..., float | None]
    device: str
    threads: int
    seconds: float
    rehearse: bool
    cost: Callable[[Given], tuple[float, float]] | None = None  # operations, bytes


def main(
    op: str,
    cases: Sequence[Case],
    providers: dict[str, Provider],
    check: Callable[..., float | None],
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    gpu: Gpu | None = None,
    cost: Callable[[Given], tuple[float, float]] | None = None,
) -> None:
    """Times the providers; the first is the one the others are held against, one is OURS.

    `check(result, **arguments)` raises if an answer is wrong, and may return its relative error.
    """
    a = parse(op)
    if a.device == "cpu":
        torch.set_num_threads(a.threads)
    if gpu is not None and (a.device == "cuda" or a.rehearse):
        cases = gpu.rehearsal if a.rehearse else gpu.cases
        # Ours goes last, as it does on the CPU.
        providers = (
            {n: p for n, p in providers.items() if n != OURS}
            | gpu.providers
            | {OURS: providers[OURS]}
        )
        dtypes = gpu.dtypes
    bench = Bench(op, check, a.device, a.threads, a.seconds, a.rehearse, cost)
    rows = Rows(a.results, a.device) if a.keep else None
    print(f"{op} on {machine(a.device)}, torch {torch.__version__}, {a.threads} thread(s)")
    wrong, lost, left = False, False, []
    for case in cases:
        for dtype in a.dtype or dtypes:
            name = {"op": op, "case": str(case), "dtype": dtype}
            if a.resume and rows is not None and rows.has(name):
                continue
            if lost or (a.until is not None and time.time() > a.until):
                left.append(f"{case} {dtype}")
                continue
            seen = []
            for row in run_case(bench, case, dtype, providers):
                wrong |= row.pop("wrong", False)
                lost |= row.pop("lost", False)
                show(name | row)
                seen.append(name | row | {"threads": a.threads})
            if rows is not None:  # whole or not at all: an interrupted case is measured again
                rows.add(seen)
    for unreached in left:
        print(f"NOT REACHED {op} {unreached}")
    sys.exit(1 if wrong else PARTIAL if left else 0)


def parse(op: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Times {op}.")
    parser.add_argument("--device", default=DEVICES[-1], choices=DEVICES)
    parser.add_argument("--dtype", nargs="+", help="names of torch dtypes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="about, for a provider of a case"
    )
    parser.add_argument(
        "--until", type=float, help="start no case after that time.time(); exit with 75"
    )
    parser.add_argument("--keep", action="store_true", help="append to RESULTS/<machine>.csv")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--resume", action="store_true", help="skip cases that RESULTS has already")
    parser.add_argument("--rehearse", action="store_true", help="the GPU's bench, tiny, on the CPU")
    a = parser.parse_args()
    if a.rehearse:
        a.device, a.seconds = "cpu", 0.0
    return a


def run_case(
    bench: Bench, case: Case, dtype: str, providers: dict[str, Provider]
) -> Iterator[dict[str, Any]]:
    """The rows of a case. Where the device is lost the last one says so: nothing runs there now."""
    try:
        given = case.arguments(bench.device, getattr(torch, dtype))
        ready: dict[str, Ready] = {}
        for name, provider in providers.items():
            try:
                ready[name] = Ready.of(as_peer(provider), given, bench.check)
            except Missing as error:
                yield {"provider": name, "note": f"missing: {error}"}
            except Exception as error:
                row = failed(bench, name, error)
                yield dict(row)
                if row["lost"]:
                    return
        for name, bad in [(n, r) for n, r in ready.items() if r.wrong]:
            yield {"provider": name, "note": f"wrong: {bad.note}", "wrong": True}
            del ready[name]
        for how, cache, timers in clocks(bench, ready, given):
            for row in compare(timers, ready, bench.seconds):
                name = row["provider"]
                yield {"how": how, "cache": cache} | row | facts(bench, ready[name], row["us"])
    except Exception as error:  # past the first call nobody but ours is waited for
        yield failed(bench, OURS, error)


def failed(bench: Bench, name: str, error: Exception) -> dict[str, Any]:
    """A row in place of numbers. On the CPU nobody may fail; on a GPU others may, if it lives."""
    lost = clock.lost(bench.device)
    wrong = lost or name == OURS or bench.device == "cpu"
    if wrong:
        traceback.print_exception(error)
    said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {"provider": name, "note": f"failed: {said}", "wrong": wrong, "lost": lost}


@dataclass(frozen=True)
class Ready:
    """A provider whose answer has been looked at."""

    peer: Peer
    given: Given
    call: Call
    error: float | None
    note: str
    wrong: bool
    said: str = ""

    @classmethod
    def of(cls, peer: Peer, given: Given, check: Callable[..., float | None]) -> "Ready":
        given = peer.problem(given)
        with peer.around():
            call = peer.make(**given)
            answer = call()
        error, note = None, ""
        try:
            error = check(answer, **given)
        except AssertionError as trouble:
            note = str(trouble).partition("\n")[0] or "the check failed"
        return cls(peer, given, call, error, note, bool(note) and peer.exact, peer.says(given))

    def again(self, given: Given) -> Call:
        """The call on other memory."""
        return self.peer.make(**self.peer.problem(given))


Timers = dict[str, Callable[[], float]]  # of every provider: one reading, in seconds


def clocks(
    bench: Bench, ready: dict[str, Ready], given: Given
) -> Iterator[tuple[str, str, Timers]]:
    """The ways to time this case. A way that a provider cannot go, it is left out of."""
    if bench.device == "cpu" and not bench.rehearse:
        how, watch = (
            ("thread", time.thread_time) if bench.threads == 1 else ("wall", time.perf_counter)
        )
        yield how, "", {n: partial(clock.cpu_seconds, watch, r.call) for n, r in ready.items()}
        return
    once = partial(clock.cpu_seconds, time.perf_counter) if bench.rehearse else clock.cold_seconds
    calls: Timers = {n: partial(once, r.call) for n, r in ready.items()}
    yield "call", "cold", calls
    loops: Timers = {n: partial(clock.loop_seconds, r.call, bench.device) for n, r in ready.items()}
    yield "loop", "warm", loops
    if bench.rehearse or min((t() for t in loops.values()), default=1.0) < SHORT:
        size = sum(t.numel() * t.element_size() for t in clock.tensors(given))
        larger = 2 if bench.rehearse else 2 * clock.l2_bytes(bench.device) // max(size, 1) + 1
        several = clock.copies(given, max(2, min(64, larger)))
        yield "graph", "warm", replays(bench, ready, [given] * (2 if bench.rehearse else 20))
        yield "graph", "cold", replays(bench, ready, several)


def replays(bench: Bench, ready: dict[str, Ready], given: list[Given]) -> Timers:
    timers: Timers = {}
    for name, r in [(n, r) for n, r in ready.items() if r.peer.captured]:
        try:
            with r.peer.around():
                timers[name] = clock.Replay([r.again(g) for g in given], bench.device).seconds
        except Exception as error:
            if name == OURS or bench.device == "cpu":
                raise
            print(f"  {name} cannot be captured: {str(error).splitlines()[0][:120]}")
    return timers


def compare(timers: Timers, ready: dict[str, Ready], seconds: float) -> Iterator[dict[str, Any]]:
    """Rounds in which every provider runs once, until each has had its seconds."""
    if not timers:
        return
    slowest = 1e-9
    for name, timer in timers.items() if seconds else ():  # also warms up
        with ready[name].peer.around():
            slowest = max(slowest, timer(), timer())
    rounds = max(2 if seconds == 0 else 7, min(ROUNDS, int(seconds / slowest)))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            with ready[name].peer.around():
                times[name].append(timer())
    first = next(iter(ready))
    for name, seen in times.items():
        p20, _, _, p80 = statistics.quantiles(seen, n=5, method="inclusive")
        row = {
            "provider": name,
            "us": us(statistics.median(seen)),
            "us_p20": us(p20),
            "us_p80": us(p80),
        }
        if first in times:  # the ratio round by round: its spread is that of the comparison
            ratios = [a / b for a, b in zip(times[first], seen, strict=True)]
            p20, _, _, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
            row |= {
                "speedup": round(statistics.median(ratios), 2),
                "speedup_p20": round(p20, 2),
                "speedup_p80": round(p80, 2),
            }
        yield row


def facts(bench: Bench, ready: Ready, micros: float) -> dict[str, Any]:
    """Rates and the error; a rate counts what the problem asks for, not what a provider does."""
    row: dict[str, Any] = {"error": "" if ready.error is None else f"{ready.error:.1e}"}
    if note := f"half precision: {ready.note}" if ready.note else ready.said:
        row["note"] = note
    if bench.cost is not None and micros:
        operations, moved = bench.cost(ready.given)
        row |= {
            "tflops": round(operations / micros / 1e6, 2),
            "gbs": round(moved / micros / 1e3, 1),
        }
    return row


def us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def show(row: dict[str, Any]) -> None:
    if "us" not in row:
        print(f"  {row['case']}  {row['dtype']}  {row['provider']:<24} {row['note']}")
        return
    way = f"{row['how']} {row['cache']}".strip()
    print("  {case}  {dtype}  {provider:<24}".format(**row), end="")
    print(f" {way:<10} {row['us']:>10} us  ({row['us_p20']} to {row['us_p80']})", end="")
    ratio = f"{row['speedup']}x" if "speedup" in row else ""
    print(f"  {ratio:<7} {row.get('note', '')}".rstrip())
