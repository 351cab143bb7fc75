"""What python_tests/ and bench/ share: devices, views, tolerances. The files beside hold problems.

Two tolerances, both derived. Sums: float32 inside and one rounding out (`assert_rounded_once`).
Indices: exact wherever the float64 reference tells the candidates apart by more than float32 can
blur (the checkers in tokens.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from restore_ext.ops import DEVICE_TYPES

DEVICES = ["cpu"]
if torch.cuda.is_available() and "cuda" in DEVICE_TYPES:
    DEVICES.append("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def poison(dtype: torch.dtype) -> float | bool | int:
    """A value that would change the result if an op read it: NaN, True, or an index in range."""
    return float("nan") if dtype.is_floating_point else dtype is torch.bool or 1


def poisoned(t: Tensor) -> Tensor:
    """The same values as a view into a wider buffer of poison: a read outside the view shows."""
    *rows, width = t.shape
    wide = t.new_full((*rows, width + 16), poison(t.dtype))
    wide[..., 8:-8] = t
    return wide[..., 8:-8]


def spread(t: Tensor) -> Tensor:
    """The same values with poison between any two of them: no dimension is dense."""
    wide = t.new_full((*t.shape, 3), poison(t.dtype))
    wide[..., 1] = t
    return wide[..., 1]


def crossed(t: Tensor) -> Tensor:
    """The same values with the last dimension outermost in memory."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


VIEWS = [poisoned, spread, crossed]


def view_all(view: Callable[[Tensor], Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every tensor among them seen through the view."""
    return {k: view(a) if isinstance(a, Tensor) else a for k, a in arguments.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_bits_every_run(fn: Callable[[], Any]) -> None:
    """However often it runs, on one thread or on two."""
    with threads(1):
        first = fn()
        assert_same_bits(fn(), first)
    with threads(2):
        for _ in range(3):
            assert_same_bits(fn(), first)


def assert_rounded_once(got: Tensor, truth: Tensor, terms: int) -> None:
    """Summed in float32, rounded to got's dtype once: half an ulp, plus float32 noise."""
    assert got.shape == truth.shape
    assert torch.equal(got.isfinite(), truth.isfinite()), "NaN or Inf where the truth has none"
    finite = truth.isfinite()
    got, truth, dtype = got[finite], truth[finite], got.dtype
    if got.numel():
        noise = terms * torch.finfo(torch.float32).eps * truth.abs().max()
        bound = torch.finfo(dtype).eps / 2 * truth.abs() + noise
        error = (got - truth).abs()
        worst = (error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
        assert worst <= 1, f"error is {worst:.2f} times what one rounding allows"


def assert_compiles(fn: Callable, *examples: tuple) -> None:
    """torch.compile(fullgraph=True) gives fn's own bits; with dynamic shapes, by a single graph."""
    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic)
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            for arguments in examples:
                assert_same_bits(compiled(*arguments), fn(*arguments))
