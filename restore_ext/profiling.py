"""Named ranges on a profiler's timeline (NVTX, domain "restore_ext"); see docs/profiling.md.

The operators mark themselves. This is for what lies between them, in Python.
"""

import time
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch

from restore_ext import _C

_CLOCK: ContextVar["clock | None"] = ContextVar("restore_ext_clock", default=None)


class range(ContextDecorator):
    """`with profiling.range("plan"):` the time in between is one range. Or before a function.

    The verb before the first underscore is its category: score, match, select, merge, attend, plan.
    Without a profiler and a clock it costs two empty calls.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _C.range_push(self.name)
        if (running := _CLOCK.get()) is not None:
            running._enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (running := _CLOCK.get()) is not None:
            running._exit()
        _C.range_pop()


class clock:
    """`with profiling.clock(device) as c:` sums the time this thread spends in ranges: c.seconds().

    Ranges within ranges count once. On a GPU it is the time of the current stream between the ends
    of a range, taken by events: nothing waits until seconds() is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._moment: Any = _stream_moment if device.type == "cuda" else time.perf_counter
        self._token: Token[clock | None] | None = None
        self._depth = 0
        self._spans: list[list[Any]] = []

    def seconds(self) -> float:
        """So far, of ranges that were left."""
        spans = [span for span in self._spans if len(span) == 2]
        if self._moment is not _stream_moment:
            return sum(last - first for first, last in spans)
        for _, last in spans:
            last.synchronize()
        return sum(first.elapsed_time(last) for first, last in spans) / 1e3

    def stop(self) -> None:
        """Counts no range that begins from now on; the end of the `with` block does it too."""
        if self._token is not None:
            _CLOCK.reset(self._token)
            self._token = None

    def __enter__(self) -> "clock":
        self._token = _CLOCK.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _enter(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._spans.append([self._moment()])

    def _exit(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._spans[-1].append(self._moment())


def _stream_moment() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
