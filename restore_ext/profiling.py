"""Named ranges on a profiler's timeline (NVTX, domain "restore_ext"); see docs/profiling.md.

The operators mark themselves. This is for what lies between them, in Python.
"""

from contextlib import ContextDecorator
from types import TracebackType

from restore_ext import _C


class range(ContextDecorator):
    """`with profiling.range("plan"):` the time in between is one range. Or before a function.

    The verb before the first underscore is its category: score, match, select, merge, attend, plan.
    Without a profiler it costs two empty calls.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _C.range_push(self.name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _C.range_pop()
