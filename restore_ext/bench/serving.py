"""What a user of a model waits for, and what it takes: batch by batch, and many at once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from restore_ext.bench.generation import (
    Inputs,
    kv_bytes,
    time_answer,
    time_reduction,
    with_peak,
)
from restore_ext.bench.prefill import per_row, repeated
from restore_ext.bench.rounds import Reading, Spread, ratio
from restore_ext.bench.table import Column, Row
from restore_ext.bench.ways import ALL_TOKENS, STOCK, Refused, Way, attentions

COLUMNS = (
    Column("way", "method", number=False),
    Column("attention", "attention", number=False),
    Column("batch", "batch"),
    Column("concurrency", "at once"),
    Column("tokens", "visual tokens"),
    Column("ttft_ms", "TTFT ms", spread=True),
    Column("speedup", "speed-up", spread=True),
    Column("token_ms", "ms/token", spread=True),
    Column("reduction_ms", "reduction ms", spread=True),
    Column("reduction_share", "of TTFT"),
    Column("peak_mib", "peak MiB", spread=True),
    Column("kv_kib", "KV KiB"),
    Column("note", "", number=False),
)
ATTENTION_COLUMNS = (
    Column("attention", "attention of the unhooked model", number=False),
    Column("ttft_ms", "TTFT ms", spread=True),
    Column("note", "", number=False),
)


@dataclass
class Seen:
    """Readings of a way in one cell of the grid, round by round: seconds, and bytes of `peak`."""

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    reduction: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)


def measure_attentions(model: Any, inputs: Inputs, rounds: int, clock: Reading) -> list[Row]:
    """A row for each stock attention, the fastest first; those that do not run here come last.

    The model has the fastest one afterwards.
    """
    rows, runs = [], []
    for name, why_not in attentions(model, inputs):
        if why_not:
            rows.append({"attention": name, "note": f"not used: {why_not}"})
        else:
            runs.append(name)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in runs:
            model.set_attn_implementation(name)
            times[name].append(time_answer(model, inputs, 0, clock)[0])
    runs.sort(key=lambda name: median(times[name]))
    model.set_attn_implementation(runs[0])
    return [
        {"attention": name} | Spread.of(times[name]).columns("ttft_ms", 1e3, 1) for name in runs
    ] + rows


@dataclass(frozen=True)
class Serving:
    """A model to be asked by several at once.

    following  tokens after the first
    fastest    the unhooked model's attention; hooked: that of the hooked one outside its own
    """

    model: Any
    inputs: Inputs  # of one prompt
    ways: Sequence[Way]
    following: int
    rounds: int
    clock: Reading
    fastest: str
    hooked: str

    def measure(
        self,
        batches: Sequence[int],
        concurrencies: Sequence[int],
        done: Callable[[], object] = lambda: None,
    ) -> Iterator[Row]:
        """A row for each way, batch size and concurrency.

        Concurrency is a number of threads, each with a request (a batch) of its own to the one
        model, that start together; a reading is the mean over them. `done` is called after each way
        of a round, of which there is one more, to warm up.
        """
        for B in batches:
            inputs = repeated(self.inputs, B)
            for C in concurrencies:
                yield from self._cell(inputs, B, C, done)

    def _cell(self, inputs: Inputs, B: int, C: int, done: Callable[[], object]) -> Iterator[Row]:
        rows: dict[str, Row] = {}
        seen: dict[str, Seen] = {}
        ways = {way.name: way for way in self.ways}
        with ThreadPoolExecutor(C) as pool:
            for name, way in ways.items():
                row = rows[name] = {"way": name, "batch": str(B), "concurrency": str(C)}
                try:
                    row |= self._warm_up(inputs, way, C)
                except Refused as refusal:
                    row |= {"attention": "", "note": f"refused: {refusal}"}
                else:
                    seen[name] = Seen()
                done()
            for _ in range(self.rounds):
                for name, readings in seen.items():
                    self._turn(pool, C, inputs, ways[name], readings)
                    done()
        base = seen[ALL_TOKENS].first
        for name, readings in seen.items():
            rows[name] |= self._columns(readings, None if name == ALL_TOKENS else base)
        yield from rows.values()

    def _attention(self, way: Way) -> str:
        name = self.fastest if way is STOCK else self.hooked
        self.model.set_attn_implementation(name)
        return name

    def _warm_up(self, inputs: Inputs, way: Way, C: int) -> Row:
        """Also what needs no repetition."""
        name = self._attention(way)
        with way.attached(self.model) as handle:
            time_answer(self.model, inputs, self.following, self.clock)
            report = None if handle is None else handle.last
            own = way is not STOCK and handle.settings.backend == "op"
            return {
                "attention": "restore_ext" if own else name if way is STOCK else f"{name} + mask",
                "tokens": per_row(self.model, inputs, report),
                "kv_kib": f"{C * kv_bytes(self.model, inputs) / 2**10:.0f}",
            }

    def _turn(
        self, pool: ThreadPoolExecutor, C: int, inputs: Inputs, way: Way, readings: Seen
    ) -> None:
        self._attention(way)
        start = threading.Barrier(C)

        def ask() -> tuple[float, float]:
            start.wait()
            return time_answer(self.model, inputs, self.following, self.clock)

        def ask_all() -> list[tuple[float, float]]:
            return [asked.result() for asked in [pool.submit(ask) for _ in range(C)]]

        with way.attached(self.model):
            answers = ask_all()
            readings.first.append(sum(first for first, _ in answers) / C)
            readings.token.append(sum(token for _, token in answers) / C)
            if way is not STOCK and C == 1:  # beside others it would be a share of waiting
                readings.reduction.append(time_reduction(self.model, inputs, self.clock))
            # Once more: memory that was just given back to the system makes an answer slower.
            _, peak = with_peak(ask_all, self.model.device)
            if peak is not None:
                readings.peak.append(peak)

    def _columns(self, readings: Seen, base: Sequence[float] | None) -> Row:
        first = Spread.of(readings.first)
        row = first.columns("ttft_ms", 1e3, 1)
        if self.following:
            row |= Spread.of(readings.token).columns("token_ms", 1e3)
        if readings.peak:
            row |= Spread.of(readings.peak).columns("peak_mib", 2.0**-20, 1)
        if base is None:
            return row
        row |= ratio(base, readings.first).columns("speedup")
        if not readings.reduction:
            return row
        spent = Spread.of(readings.reduction)
        row |= spent.columns("reduction_ms", 1e3, 1)
        return row | {"reduction_share": f"{100 * spent.median / first.median:.0f} %"}
