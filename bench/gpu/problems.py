"""One or more small problems of every operator, for all that asks not what it computes but how."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu.stages import KERNELS
from bench.provider import Given
from restore_ext import ops
from restore_ext.testing.attention import AttentionCase
from restore_ext.testing.paged import PagedCase
from restore_ext.testing.row_scores import RowScoresCase
from restore_ext.testing.tokens import MergeCase, TokenCase

FORCED = "RESTORE_EXT_ATTENTION"


@dataclass(frozen=True)
class Problem:
    op: str
    case: Any
    make: Callable[[Any, str, torch.dtype], Given]
    kernel: str = ""  # of several on a GPU the one that is to answer; "" leaves the choice

    def __str__(self) -> str:
        return f"{self.op} {self.case}" + (f" by {self.kernel}" if self.kernel else "")

    def arguments(self, device: str, dtype: torch.dtype = torch.bfloat16) -> Given:
        return self.make(self.case, device, dtype)

    def call(self, given: Given) -> Any:
        with forced(self.kernel):
            return getattr(ops, self.op)(**given)


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """calibrated_attention by that kernel; what it does not take is a RuntimeError then."""
    before = os.environ.get(FORCED)
    if kernel:
        os.environ[FORCED] = kernel
    try:
        yield
    finally:
        if kernel:
            os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before


def match(case: TokenCase, device: str, dtype: torch.dtype) -> Given:
    return {
        "metric": case.x(device, dtype),
        "r": case.budget(device),
        "valid": case.valid(device),
    }


def score(case: TokenCase, device: str, dtype: torch.dtype) -> Given:
    return {"x": case.x(device, dtype), "valid": case.valid(device)}


def select(case: TokenCase, device: str, dtype: torch.dtype) -> Given:
    return score(case, device, dtype) | {"k": case.budget(device)}


def assign(case: TokenCase, device: str, dtype: torch.dtype) -> Given:
    return score(case, device, dtype) | {"anchors": case.anchors(device)}


def given_by_case(case: Any, device: str, dtype: torch.dtype) -> Given:
    return case.arguments(device, dtype)


PLAIN = TokenCase(B=2, N=150, k=20, C=72)
RAGGED = TokenCase(B=3, N=77, k=9, C=33, ragged=True, budgets=True)
TOKENS = {
    "match_bipartite": match,
    "score_anchors": score,
    "select_anchors": select,
    "assign_anchors": assign,
    "select_diverse": select,
}
ATTENTION = [
    AttentionCase(B=2, Hq=4, Hkv=2, Lq=150, Lk=150, D=128),
    AttentionCase(B=2, Hq=2, Hkv=2, Lq=70, Lk=133, D=64, axes=3, P=64, padding=(0, 31)),
    AttentionCase(B=2, Hq=8, Hkv=2, Lq=1, Lk=300, D=128, P=0),
    AttentionCase(B=1, Hq=4, Hkv=4, Lq=1, Lk=700, D=128),
]
PAGED = [
    PagedCase(Hq=4, Hkv=2, D=128, lengths=(300, 41)),
    PagedCase(Hq=4, Hkv=2, Lq=3, D=64, lengths=(100, 61), P=64, positions="merged", holes=True),
]
ROW_SCORES = [
    RowScoresCase(B=2, Hq=8, Hkv=2, Lq=1, Lk=700, D=128, P=0),
    RowScoresCase(B=2, Hq=4, Hkv=2, Lq=90, Lk=90, D=64, ranges="causal", weights="some"),
]
PROBLEMS = [
    *[Problem(op, case, make) for op, make in TOKENS.items() for case in (PLAIN, RAGGED)],
    Problem("merge_tokens", MergeCase(B=2, N=150, M=9, C=72), given_by_case),
    Problem("merge_tokens", MergeCase(B=1, N=700, M=2, C=33), given_by_case),  # long groups
    *[Problem("calibrated_attention", case, given_by_case) for case in ATTENTION],
    *[Problem("calibrated_attention_paged", case, given_by_case) for case in PAGED],
    *[Problem("row_scores", case, given_by_case) for case in ROW_SCORES],
]
# On a device whose best kernel takes them all, the others would never run.
BY_KERNEL = [
    replace(problem, kernel=kernel)
    for problem in PROBLEMS
    if problem.op == "calibrated_attention"
    for kernel in KERNELS
]

# Too large to be compared with the CPU: for what is launched only when there is a lot to do.
LARGE = [
    *[Problem(op, TokenCase(N=9000, k=200, C=128), make) for op, make in TOKENS.items()],
    Problem("merge_tokens", MergeCase(B=2, N=40000, M=3, C=256), given_by_case),
    *[
        Problem("calibrated_attention", AttentionCase(Hq=8, Hkv=H, Lq=L, Lk=4096), given_by_case)
        for H, L in ((8, 4096), (2, 4096), (2, 1))
    ],
    Problem("calibrated_attention_paged", PagedCase(Lq=8, lengths=(4096, 9000)), given_by_case),
    *[
        Problem("row_scores", RowScoresCase(Hq=8, Hkv=2, Lq=L, Lk=4096), given_by_case)
        for L in (1, 4096)
    ],
]


def changed(given: Given) -> Given:
    """Other values of the same shapes and strides: every tensor is rolled, each a bit further."""

    def other(t: Any, by: int) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        along = -2 if t.is_floating_point() and t.dim() > 2 else -1
        return torch.empty_like(t).copy_(t.roll(by, along))

    return {name: other(value, by) for by, (name, value) in enumerate(given.items(), 1)}
