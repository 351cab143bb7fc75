"""Clocks, and what else a GPU adds to a measurement: streams, graphs, events, caches.

Whatever takes a `device` has a stand-in on the CPU, so that what is written for a GPU can be run,
and shows its typos, without one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Call = Callable[[], Any]
LOOP = 10  # calls that one reading of `loop_seconds` is the mean of


def cpu_seconds(clock: Callable[[], float], fn: Call) -> float:
    start = clock()
    fn()
    return clock() - start


def cold_seconds(fn: Call) -> float:
    """One call between two events, with nothing of its inputs left in the caches."""
    torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()  # larger than any L2
    return between_events(fn)


def between_events(fn: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def loop_seconds(fn: Call, device: str) -> float:
    """Host time of calls one after the other: what an eager caller waits."""
    count = LOOP if is_cuda(device) else 1
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        fn()
    synchronize(device)
    return (time.perf_counter() - start) / count


class Replay:
    """Calls captured one after another in one CUDA graph; timed is a replay over their number."""

    def __init__(self, calls: Sequence[Call], device: str) -> None:
        self.count, self.device = len(calls), device

        def all_of_them() -> None:
            for call in calls:
                call()

        self.replay, _ = capture(all_of_them, device)
        self.replay()

    def seconds(self) -> float:
        if not is_cuda(self.device):
            return cpu_seconds(time.perf_counter, self.replay) / self.count
        return between_events(self.replay) / self.count


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize()


def lost(device: str) -> bool:
    """Whether a GPU answers no more, as after a read out of bounds. One that does is tidied up."""
    if not is_cuda(device):
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def l2_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if is_cuda(device) else 1 << 20


def capture(fn: Call, device: str) -> tuple[Call, Any]:
    """fn as a CUDA graph: what replays it, and the result that a replay writes into.

    On the CPU a replay calls fn and copies its result there.
    """
    if not is_cuda(device):
        result = fn()

        def replay() -> None:
            for old, new in zip(tensors(result), tensors(fn()), strict=True):
                old.copy_(new)

        return replay, result
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever a first call sets up must not be captured
        fn()
        fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn()
    return graph.replay, result


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """What is launched here is no part of the default stream, and does not wait for it."""
    if not is_cuda(device):
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


def keep_busy(device: str, cycles: int = 100_000_000) -> None:
    """Some 50 ms of nothing on the current stream."""
    if is_cuda(device):
        torch.cuda._sleep(cycles)


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """In here torch raises where it would wait for the device."""
    if not is_cuda(device):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def extra_bytes(fn: Call, device: str) -> int:
    """The most memory that a call takes at a time beyond what is there before; 0 on the CPU."""
    if not is_cuda(device):
        fn()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def copies(given: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The arguments, and count - 1 times their like in other memory with the same strides."""
    return [given] + [
        {k: t.clone() if isinstance(t, Tensor) else t for k, t in given.items()}
        for _ in range(count - 1)
    ]
