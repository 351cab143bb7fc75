"""Named ranges on a profiler's timeline (NVTX, domain "restore_ext"); see docs/profiling.md.

The operators mark themselves. This is for what lies between them, in Python, which a stopwatch can
time without a profiler.
"""

import time
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch

from restore_ext import _C

_RUNNING: ContextVar["stopwatch | None"] = ContextVar("restore_ext_stopwatch", default=None)


class range(ContextDecorator):
    """`with profiling.range("plan"):` the time in between is one range. Or before a function.

    The verb before the first underscore is its category: score, match, select, merge,
    attend, plan, cut.
    Without a profiler and a stopwatch it costs two empty calls and two looks at a variable.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _C.range_push(self.name)
        if (watch := _RUNNING.get()) is not None:
            watch._enter(self.name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (watch := _RUNNING.get()) is not None:
            watch._exit()
        _C.range_pop()


class stopwatch:
    """`with profiling.stopwatch(device) as watch:` times what this thread spends in ranges.

    What lies in another range counts to the outermost. On a GPU it is the time of the current
    stream between the ends of a range, by events: nothing waits until somebody asks.

    device  where the work is done; the CPU if None
    clock   on a CPU: what tells the time, in seconds
    """

    def __init__(
        self,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._by_events = device is not None and device.type == "cuda"
        self._moment: Callable[[], Any] = _stream_moment if self._by_events else clock
        self._token: Token[stopwatch | None] | None = None
        self._depth = 0
        self._spans: list[tuple[str, list[Any]]] = []  # of outermost ranges: begin, and end if over

    def seconds(self) -> dict[str, float]:
        """So far, of ranges that were left, by name."""
        found: dict[str, float] = {}
        for name, span in self._spans:
            if len(span) == 2:
                found[name] = found.get(name, 0.0) + self._between(*span)
        return found

    def total(self) -> float:
        """So far, of ranges that were left."""
        return sum(self.seconds().values())

    def stop(self) -> None:
        """Counts no range that begins from now on; the end of the `with` block does it too."""
        if self._token is not None:
            _RUNNING.reset(self._token)
            self._token = None

    def __enter__(self) -> "stopwatch":
        self._token = _RUNNING.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _enter(self, name: str) -> None:
        self._depth += 1
        if self._depth == 1:
            self._spans.append((name, [self._moment()]))

    def _exit(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._spans[-1][1].append(self._moment())

    def _between(self, first: Any, last: Any) -> float:
        if not self._by_events:
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def _stream_moment() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
