"""One generation on the clock, and what it takes beside time."""

import ctypes
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from restore_ext import profiling
from restore_ext.bench.rounds import Reading

if TYPE_CHECKING:
    from restore_ext.hf.report import Report, VisualTokens

Inputs = Mapping[str, Tensor]
Result = TypeVar("Result")


class _Watch:
    """A streamer that notes when it is handed the prompt and then each token, on the host."""

    def __init__(self, clock: Reading) -> None:
        self.clock = clock
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        """Nothing is left to be flushed."""


@torch.no_grad()
def generate(model: Any, inputs: Inputs, new_tokens: int, **options: Any) -> Any:
    """A greedy answer of at most `new_tokens`."""
    return model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=new_tokens, **options
    )


def time_answer(model: Any, inputs: Inputs, following: int, clock: Reading) -> tuple[float, float]:
    """(seconds to the first token, seconds a token over the `following` ones; 0 for none).

    The first token has seen the picture and the prompt: vision tower and reduction count.
    """
    watch, new = _Watch(clock), 1 + following
    start = clock()
    generate(model, inputs, new, min_new_tokens=new, streamer=watch)
    first, last = watch.times[1], watch.times[new]  # times[0] is the prompt's
    return first - start, (last - first) / following if following else 0.0


def time_reduction(model: Any, inputs: Inputs, clock: Reading) -> float:
    """Seconds of one prefill that are spent in score_*, select_*, merge_*, plan_* and cut_*."""
    with profiling.stopwatch(clock=clock) as watch:
        generate(model, inputs, 1, min_new_tokens=1)
    return watch.total()


def kv_bytes(model: Any, inputs: Inputs) -> int:
    """Counted in the cache itself, which after one new token holds the prompt and no more."""
    cache = generate(model, inputs, 1, return_dict_in_generate=True).past_key_values
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values))
    return sum(t.numel() * t.element_size() for t in tensors)


def visual_tokens(model: Any, inputs: Inputs, report: "Report | None") -> "VisualTokens":
    """Of a batch."""
    from restore_ext.hf.report import VisualTokens

    return VisualTokens.count(inputs["input_ids"], model.config, report)


def with_peak(run: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What `run` gives, and the most bytes it takes beyond what is there before, all its threads
    together; None where nobody says.

    On a GPU, torch's allocator says. On a CPU it is resident memory, by Linux's own high-water
    mark, after what is free has gone back to the system.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    if not _reset_high_water():
        return run(), None
    before = _resident("VmRSS")
    result = run()
    return result, max(0, _resident("VmHWM") - before)


def _reset_high_water() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # no Linux, no glibc, or not allowed here
        return False
    return True


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, f"/proc/self/status has no {name}"
    return 1024 * int(found[1])
