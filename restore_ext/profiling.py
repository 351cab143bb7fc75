"""Named ranges on a profiler's timeline (NVTX, domain "restore_ext"); see docs/profiling.md.

The operators mark themselves. This is for what lies between them, in Python, which a stopwatch()
can time without a profiler.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType

from restore_ext import _C


@dataclass
class Stopwatch:
    """Seconds spent in ranges, by name; what lies in another range counts to the outermost."""

    clock: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def enter(self) -> None:
        self._open.append(self.clock())

    def leave(self, name: str) -> None:
        start = self._open.pop()
        if not self._open:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start


_STOPWATCH: ContextVar[Stopwatch | None] = ContextVar("restore_ext_stopwatch", default=None)


@contextmanager
def stopwatch(clock: Callable[[], float] = time.perf_counter) -> Iterator[Stopwatch]:
    """Times the ranges of this thread inside the `with` block.

    clock  in seconds. For work on a GPU one that waits for it: a range else ends at the launch
    """
    watch = Stopwatch(clock)
    token = _STOPWATCH.set(watch)
    try:
        yield watch
    finally:
        _STOPWATCH.reset(token)


class range(ContextDecorator):
    """`with profiling.range("plan"):` the time in between is one range. Or before a function.

    The verb before the first underscore is its category: score, match, select, merge, attend, plan.
    Without a profiler and a stopwatch it costs two empty calls and two looks at a variable.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _C.range_push(self.name)
        if (watch := _STOPWATCH.get()) is not None:
            watch.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (watch := _STOPWATCH.get()) is not None:
            watch.leave(self.name)
        _C.range_pop()
