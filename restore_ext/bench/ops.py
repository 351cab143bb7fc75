"""The operators beside plain torch, on the problems of a prompt of LLaVA-1.5."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from restore_ext import ops
from restore_ext.bench import plain
from restore_ext.bench.rounds import Reading, Spread, ratio, take_turns
from restore_ext.bench.table import Column, Row
from restore_ext.testing.attention import AttentionCase
from restore_ext.testing.attention import truth as attended
from restore_ext.testing.paged import PagedCase, contiguous
from restore_ext.testing.row_scores import RowScoresCase
from restore_ext.testing.row_scores import truth as scored
from restore_ext.testing.tokens import (
    MergeCase,
    TokenCase,
    check_assign_anchors,
    check_match_bipartite,
    check_merge_tokens,
    check_score_anchors,
    check_select_anchors,
    check_select_diverse,
)

COLUMNS = (
    Column("way", "operator", number=False),
    Column("problem", "problem", number=False),
    Column("plain_us", "plain torch us", spread=True),
    Column("ours_us", "restore_ext us", spread=True),
    Column("speedup", "speed-up", spread=True),
)
# Relative error of the whole result, of sums that round in their own dtype.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
Given = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What an operator is asked.

    given  (device, dtype) -> its arguments by name
    check  (result, **arguments) raises AssertionError if the result is wrong
    """

    op: str
    about: str
    given: Callable[[str, torch.dtype], Given]
    check: Callable[..., object]


def problems() -> list[Problem]:
    token, merge = TokenCase(), MergeCase()
    found = [
        Problem(op, str(token), partial(_tokens, token, **more), check)
        for op, more, check in (
            ("score_anchors", {}, check_score_anchors),
            ("select_anchors", {"k": token.k}, check_select_anchors),
            ("select_diverse", {"k": token.k}, check_select_diverse),
            ("match_bipartite", {"r": 144}, check_match_bipartite),
            ("assign_anchors", {"anchors": None}, check_assign_anchors),
        )
    ]
    found.append(Problem("merge_tokens", str(merge), merge.arguments, check_merge_tokens))
    for length, queries in ((183, 183), (704, 704), (704, 1)):
        case = AttentionCase(Hq=8, Hkv=8, Lq=queries, Lk=length)
        about = f"H={case.Hq} Lq={queries} Lk={length} D={case.D}"
        found.append(Problem("calibrated_attention", about, case.arguments, _check_attention))
    pages = PagedCase(Hq=8, Hkv=8, page=16, lengths=(704,))
    about = "H=8 Lq=1 Lk=704 D=128, pages of 16"
    found.append(Problem("calibrated_attention_paged", about, pages.arguments, _check_paged))
    for R in (1, 20):
        about = f"H=8 R={R} Lk=704 D=128"
        case = RowScoresCase(Hq=8, Hkv=8, Lq=R, Lk=704, sizes=False, positions=None, P=0)
        found.append(Problem("row_scores", about, case.arguments, _check_scores))
    return found


def measure_ops(
    device: str,
    dtype: torch.dtype,
    rounds: int,
    clock: Reading,
    done: Callable[[], object] = lambda: None,
    asked: Sequence[Problem] | None = None,
) -> list[Row]:
    """A row for each problem. Both answers are checked before the clock starts, which warms up."""
    rows = []
    for problem in problems() if asked is None else asked:
        given = problem.given(device, dtype)
        ours, other = (partial(getattr(m, problem.op), **given) for m in (ops, plain))
        for call in (ours, other):
            problem.check(call(), **given)
        readings = {"plain": _timed(other, clock), "ours": _timed(ours, clock)}
        times = take_turns(readings, rounds)
        row = {"way": problem.op, "problem": problem.about}
        for name, seen in times.items():
            row |= Spread.of(seen).columns(f"{name}_us", 1e6, 0)
        rows.append(row | ratio(times["plain"], times["ours"]).columns("speedup"))
        done()
    return rows


def _timed(call: Callable[[], object], clock: Reading) -> Reading:
    def seconds() -> float:
        start = clock()
        call()
        return clock() - start

    return seconds


def _tokens(case: TokenCase, device: str, dtype: torch.dtype, **more: Any) -> Given:
    name = "metric" if "r" in more else "x"
    if "anchors" in more:
        more = {"anchors": case.anchors(device)}
    return {name: case.x(device, dtype), **more}


def _check_attention(out: torch.Tensor, **given: Any) -> None:
    _assert_near(out, attended(given)[0])


def _check_paged(out: torch.Tensor, **given: Any) -> None:
    _check_attention(out, **contiguous(given))


def _check_scores(out: torch.Tensor, **given: Any) -> None:
    _assert_near(out, scored(given))


def _assert_near(out: torch.Tensor, exact: torch.Tensor) -> None:
    error = ((out.double() - exact).norm() / exact.norm()).item()
    assert error <= TOLERANCE[out.dtype], f"the relative error is {error:.1e}"
