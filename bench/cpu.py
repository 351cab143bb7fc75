"""What the CPU kernels are to reach, and how far they are: python -m bench.cpu [--json FILE]

Each line holds an operator against a peer in this process, in turns, on one thread, by the thread's
own time: the ratio is the peer's time to ours, median and 20th to 80th percentile of its rounds.
The bars are meant for a core with AVX512-BF16, 16 bits wide; a narrower machine says what it can.
RESTORE_EXT_CPU names the level of ours (generic, avx2, avx512, avx512_bf16), by default the last of
these that the processor runs. The last lines are about
whole models (bench/cpu_model.py).
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import restore_ext
from bench import clock, cpu_model
from bench.bench_calibrated_attention import prompt
from bench.bench_decode import step
from bench.bench_match_bipartite import Case as MatchCase
from bench.bench_select_anchors import Case as AnchorCase
from bench.bench_select_diverse import Case as DiverseCase
from bench.gpu import attention, tokens
from bench.harness import OURS, Ready, compare
from bench.machine import commit, machine
from bench.measured import reached
from bench.provider import Peer, Provider, as_peer
from restore_ext.bench.plain import merged_with
from restore_ext.config import cpu_level
from restore_ext.testing import tokens as checks
from restore_ext.testing.tokens import MergeCase

Check = Callable[..., float | None]
BOTH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Goal:
    op: str
    case: Any
    dtype: str
    peer: str
    provider: Provider
    ours: Callable[..., Any]
    check: Check
    bar: float
    goal: float
    peer_check: Check | None = None  # where the peer answers another question

    def measure(self, seconds: float) -> dict[str, Any]:
        given = self.case.arguments("cpu", BOTH[self.dtype])
        ready = {
            self.peer: Ready.of(as_peer(self.provider), given, self.peer_check or self.check),
            OURS: Ready.of(as_peer(self.ours), given, self.check),
        }
        for name, one in ready.items():
            if one.wrong:
                raise SystemExit(f"{self.op} {self.case} {self.dtype}: {name} is wrong: {one.note}")
        timers = {
            name: partial(clock.cpu_seconds, time.thread_time, one.call)
            for name, one in ready.items()
        }
        peer, ours = compare(timers, ready, seconds)
        low, high = sorted((ours["speedup_p20"], ours["speedup_p80"]))
        said = {"op": self.op, "case": str(self.case), "dtype": self.dtype, "peer": self.peer}
        times = {"peer_us": peer["us"], "us": ours["us"]}
        ratio = {"ratio": ours["speedup"], "low": low, "high": high}
        return said | ratio | {"bar": self.bar, "goal": self.goal} | times


def goals() -> Iterator[Goal]:
    """The lines, in order; a ratio of bytes over the speed of the memory for decoding."""
    yield from _prefill()
    for dtype in BOTH:
        yield Goal(
            "calibrated_attention, decoding",
            step(4096),
            dtype,
            "reading as many bytes",
            Peer(_stream),
            restore_ext.calibrated_attention,
            attention.check,
            bar=0.7,
            goal=0.85,
            peer_check=_anything,
        )
    yield from _each(
        "select_anchors",
        [AnchorCase(C=4096), AnchorCase(N=2880, k=320)],
        "released formulation",
        tokens.half(tokens.released_anchors, mode="official"),
        restore_ext.select_anchors,
        checks.check_select_anchors,
        {"float32": (2.5, 4), "bfloat16": (2, 3)},
    )
    yield from _each(
        "match_bipartite",
        [MatchCase(N=2880, k=720)],
        "matmul and max of unit rows",
        Peer(tokens.match_units, exact=False),
        restore_ext.match_bipartite,
        checks.check_match_bipartite,
        {"float32": (1.8, 2.3), "bfloat16": (1.2, 1.6)},
    )
    yield from _each(
        "select_diverse",
        [DiverseCase(), DiverseCase(N=2880, k=128)],
        "released loop",
        tokens.half(tokens.released_diverse),
        restore_ext.select_diverse,
        checks.check_select_diverse,
        dict.fromkeys(BOTH, (2, 4)),
    )
    merges = {
        "one-hot product": (tokens.half(tokens.released_merge), (4, 8)),
        "index_add": (Peer(_index_add), (1.5, 2.5)),
    }
    for peer, (provider, wanted) in merges.items():
        yield from _each(
            "merge_tokens",
            [MergeCase(N=2880, M=320, C=4096)],
            peer,
            provider,
            restore_ext.merge_tokens,
            checks.check_merge_tokens,
            dict.fromkeys(BOTH, wanted),
        )


def _prefill() -> Iterator[Goal]:
    """LLaVA-1.5's and Qwen2.5-VL's heads, a prompt of 704 tokens and one of 1536."""
    peers: dict[str, tuple[Provider, dict[str, tuple[float, float]]]] = {
        "released code's layer": (
            Peer(attention.official_layer),
            {"float32": (2, 3.5), "bfloat16": (3, 5)},
        ),
        "SDPA causal, no bias": (
            Peer(attention.sdpa_mask_kept, attention.without_bias),
            {"float32": (1.5, 2.3), "bfloat16": (2.5, 4)},
        ),
        "compiled FlexAttention": (
            Peer(_compiled_flex),
            {"float32": (1.5, 2.3), "bfloat16": (2.5, 4)},
        ),
    }
    for Hkv in (32, 4):
        for L in (704, 1536):
            case = prompt(L, Hq=32 if Hkv == 32 else 28, Hkv=Hkv)
            for peer, (provider, wanted) in peers.items():
                yield from _each(
                    "calibrated_attention, prompt",
                    [case],
                    peer,
                    provider,
                    restore_ext.calibrated_attention,
                    attention.check,
                    wanted,
                )


def _each(
    op: str,
    cases: Sequence[Any],
    peer: str,
    provider: Provider,
    ours: Callable[..., Any],
    check: Check,
    wanted: dict[str, tuple[float, float]],
) -> Iterator[Goal]:
    for case in cases:
        for dtype, (bar, goal) in wanted.items():
            yield Goal(op, case, dtype, peer, provider, ours, check, bar, goal)


def _stream(**given: Any) -> Callable[[], Tensor]:
    """One pass over as many bytes as the keys and values have, at the speed of the memory."""
    size = sum(given[name].numel() * given[name].element_size() for name in ("key", "value"))
    return torch.ones(size // 4).sum


def _anything(answer: Any, **given: Any) -> None:
    """The stream computes no attention."""


def _index_add(**given: Any) -> Callable[[], Any]:
    return partial(merged_with(tokens.by_index_add), **given)


def _compiled_flex(**given: Any) -> Callable[[], Tensor]:
    torch.compiler.reset()  # past its limit of recompilations what we would time is eager code
    with torch.no_grad():
        return attention.flex_by(torch.compile(flex_attention, dynamic=False), given)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--seconds", type=float, default=5.0, help="about, for one side of a line")
    parser.add_argument(
        "--only", action="append", help="lines that have this in them; more than once: any of these"
    )
    parser.add_argument("--list", action="store_true", help="print the lines, measure nothing")
    a = parser.parse_args(argv)
    lines = (*goals(), *cpu_model.lines())
    only = a.only or [""]
    names = {f"{g.op} | {g.case} | {g.dtype} | {g.peer}": g for g in lines}
    chosen = [g for name, g in names.items() if any(part in name for part in only)]
    if not chosen:
        parser.error(f"--only: no line has {' or '.join(only)} in it")
    if a.list:
        for g in chosen:
            print(f"{g.op} | {g.case} | {g.dtype} | {g.peer} | {g.bar} | {g.goal}")
        return 0
    torch.set_num_threads(1)
    made = {
        "command": shlex.join(
            ["python", "-m", "bench.cpu", "--seconds", f"{a.seconds:g}"]
            + [word for part in a.only or () for word in ("--only", part)]
        ),
        "machine": machine("cpu"),
        "level": cpu_level(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit(),
    }
    print(", ".join(f"{name} {value}" for name, value in made.items()))
    rows = []
    for goal in chosen:
        with torch.inference_mode():
            row = goal.measure(a.seconds)
        rows.append(row)
        print(line(row), flush=True)
        if a.json is not None:
            a.json.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")
    barred = [row for row in rows if row["bar"] is not None]
    above = sum(row["ratio"] >= row["bar"] for row in barred)
    print(f"{above} of {len(barred)} lines at their bar or above")
    return 0


def line(row: dict[str, Any]) -> str:
    wanted = [f"{name} {row[name]}" for name in ("bar", "goal") if row[name] is not None]
    return (
        "{op} | {case} | {dtype} | {peer} | {ratio}x ({low} to {high})".format(**row)
        + f" | {', '.join(wanted) or 'no bar'} | {reached(row)['reached']}"
    )


if __name__ == "__main__":
    sys.exit(main())
