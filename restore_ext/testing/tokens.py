"""Problems for the token operators, and what counts as a right answer to them.

A checker takes an op's result and arguments, computes the cosines in float64 and accepts every
index that is best up to TOLERANCE: an index must be the reference's wherever the margin is larger.
Exact ties are a matter of kind="corners", whose cosines are whole numbers in any arithmetic.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restore_ext import reference
from restore_ext.testing import assert_rounded_once

NEVER = float("-inf")
TOLERANCE = 1e-6  # of a cosine of two float32 unit vectors: a few units in its last place


@dataclass(frozen=True)
class TokenCase:
    """By default LLaVA-1.5: k of N = 576 patch tokens are kept, C = 1024 channels."""

    B: int = 1
    N: int = 576
    k: int = 64
    C: int = 1024
    kind: str = "random"
    ragged: bool = False  # each row has its own valid tokens
    budgets: bool = False  # each row has its own k, some more than there are tokens

    def __str__(self) -> str:
        special = [self.kind] * (self.kind != "random")
        special += ["ragged"] * self.ragged + ["budgets"] * self.budgets
        return " ".join([f"B={self.B} N={self.N} k={self.k} C={self.C}", *special])

    def x(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.B, self.N, self.C, generator=g)
        x += 0.5 * torch.randn(
            self.C, generator=g
        )  # as in real features, most cosines are positive
        some = torch.rand(self.B, self.N, generator=g)
        if self.kind == "duplicates":
            copies = torch.randint(self.N // 3 + 1, (self.B, self.N, 1), generator=g)
            x = x.gather(1, copies.expand_as(x))
        elif self.kind == "zeros":
            x[some < 0.3] = 0
        elif self.kind == "broken":
            x[some < 0.3, -1] = float("nan")
            x[some < 0.1, -1] = float("inf")
        elif self.kind == "extreme":  # squares overflow float32, or vanish in it
            tiny, huge = torch.finfo(dtype).tiny * 8, torch.finfo(dtype).max / 8
            x = x.double() / x.abs().max() * torch.where(some < 0.5, tiny, huge)[..., None]
        elif self.kind == "corners":  # cosines are -1, 0 or 1
            x = torch.zeros_like(x)
            corner = torch.randint(min(self.C, 6), (self.B, self.N), generator=g)
            x.scatter_(2, corner[..., None], torch.where(some < 0.2, -2.0, 0.5)[..., None])
        return x.to(device, dtype)

    def valid(self, device: str = "cpu") -> Tensor | None:
        if not self.ragged:
            return None
        g = torch.Generator().manual_seed(1)
        valid = torch.rand(self.B, self.N, generator=g) < 0.7
        valid[-1:] = False  # the last row has no token at all
        return valid.to(device)

    def budget(self, device: str = "cpu") -> int | Tensor:
        if not self.budgets:
            return self.k
        g = torch.Generator().manual_seed(2)
        budget = torch.randint(-1, self.N + 3, (self.B,), generator=g, dtype=torch.int32)
        return budget.to(device)

    def anchors(self, device: str = "cpu") -> Tensor:
        """k tokens a row, the last of them -1 where budgets are."""
        g = torch.Generator().manual_seed(3)
        anchors = torch.rand(self.B, self.N, generator=g).argsort(1)[:, : self.k].sort(1).values
        if self.budgets:
            anchors[:, self.k // 2 :] = -1
        return anchors.to(device)


SMALL = TokenCase(B=3, N=29, k=9, C=24)
CASES = [
    TokenCase(),
    TokenCase(B=4, N=130, k=31, C=131),  # nothing divides anything
    TokenCase(N=1, k=1, C=1),
    TokenCase(N=1, k=0, C=3),
    TokenCase(B=2, N=0, k=0, C=8),
    TokenCase(B=2, N=6, k=3, C=0),
    TokenCase(B=2, N=2, k=1, C=20),
    TokenCase(B=2, N=21, k=21, C=17),
    TokenCase(B=2, N=20, k=0, C=17),
    TokenCase(B=0, N=20, k=5, C=17),
    TokenCase(B=4, N=33, k=8, C=40, ragged=True),
    TokenCase(B=4, N=33, k=8, C=40, budgets=True),
    TokenCase(B=4, N=34, k=30, C=40, ragged=True, budgets=True),
    TokenCase(B=2, N=40, k=20, C=33, kind="duplicates"),
    TokenCase(B=2, N=40, k=20, C=33, kind="zeros"),
    TokenCase(B=2, N=40, k=36, C=33, kind="broken"),
    TokenCase(B=3, N=40, k=20, C=33, kind="broken", ragged=True),
    TokenCase(B=2, N=40, k=20, C=33, kind="extreme"),
]
TIES = [
    TokenCase(B=3, N=48, k=20, C=12, kind="corners"),
    TokenCase(B=3, N=47, k=40, C=5, kind="corners", ragged=True, budgets=True),
]


@dataclass(frozen=True)
class MergeCase:
    """By default LLaVA-1.5: N = 576 patch tokens join M = 64 groups, some of them none."""

    B: int = 1
    N: int = 576
    M: int = 64
    C: int = 1024

    def __str__(self) -> str:
        return f"B={self.B} N={self.N} M={self.M} C={self.C}"

    def arguments(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.B, self.N, self.C, generator=g)
        size = torch.randint(1, 9, (self.B, self.N), generator=g).float()
        group = torch.randint(-1, self.M + 1, (self.B, self.N), generator=g)
        position = torch.randint(-99, 9999, (self.B, self.N), generator=g)
        return {
            "x": x.to(device, dtype),
            "group": group.to(device),
            "num_groups": self.M,
            "size": size.to(device),
            "position": position.to(device),
        }


MERGE_CASES = [
    MergeCase(),
    MergeCase(B=4, M=192, C=96),
    MergeCase(N=1, M=1, C=1),
    MergeCase(B=2, N=130, M=7, C=131),  # nothing divides anything
    MergeCase(N=576, M=1, C=33),  # one group takes all
    MergeCase(B=2, N=3, M=64, C=20),  # most groups are empty
    MergeCase(B=2, N=0, M=3, C=20),
    MergeCase(B=2, N=5, M=3, C=0),
    MergeCase(B=0, N=20, M=5, C=16),
]


def check_match_bipartite(result, metric, r, *, valid=None, class_token=False) -> None:
    B, N, _ = metric.shape
    protected = int(class_token)
    R = min(r if isinstance(r, int) else N, max((N - protected) // 2, 0))
    ragged = valid is not None or isinstance(r, Tensor)
    U = (N + 1) // 2 if ragged else (N + 1) // 2 - R
    assert [t.shape for t in result] == [(B, U), (B, R), (B, R)]
    for b, tokens, cosine in images(metric, valid):
        n = len(tokens)
        take = max(min(_of_row(r, b), R, (n - protected) // 2), 0)
        left, src, dst = result[0][b], result[1][b], result[2][b]
        left = _among(_filled(left, (n + 1) // 2 - take), tokens) // 2
        src, dst = _among(_filled(src, take), tokens), _among(_filled(dst, take), tokens)
        assert (src % 2 == 0).all() and (dst % 2 == 1).all(), "even tokens go to odd ones"
        src = src // 2
        both = torch.cat([src, left]).sort().values
        assert torch.equal(both, torch.arange((n + 1) // 2)), "an even token is lost or doubled"
        if n < 2:
            continue
        cosine = cosine[::2, 1::2]
        best = cosine.amax(1)
        chosen = torch.where(
            best[src] == NEVER, dst == 1, cosine[src, dst // 2] >= best[src] - TOLERANCE
        )
        assert chosen.all(), "a token has a more similar partner"
        if class_token:
            assert left[0] == 0 and (left.diff() > 0).all(), "unmerged must ascend from token 0"
            left = left[1:]
            left = left[best[left].argsort(descending=True, stable=True)]
        assert_falling(best, torch.cat([src, left]))


def check_score_anchors(score, x, *, mode="paper", valid=None) -> None:
    assert score.shape == x.shape[:2] and score.dtype == torch.float32
    for (b, tokens, _), (low, high) in zip(images(x, valid), _bounds(x, mode, valid), strict=True):
        got = score[b].cpu()
        outside = torch.ones(x.shape[1], dtype=torch.bool)
        outside[tokens] = False
        assert (got[outside] == NEVER).all(), "a token that is not valid has a score"
        got = got[tokens].double()
        assert ((got >= low) & (got <= high)).all(), "a score outside what float32 may make of it"


def check_select_anchors(anchors, x, k, *, mode="paper", valid=None) -> None:
    assert anchors.shape == (len(x), x.shape[1] if isinstance(k, Tensor) else k)
    for (b, tokens, _), (low, high) in zip(images(x, valid), _bounds(x, mode, valid), strict=True):
        take = max(min(_of_row(k, b), len(tokens)), 0)
        picked = _among(_filled(anchors[b], take), tokens)
        assert (picked.diff() > 0).all(), "anchors must ascend"
        left = torch.ones(len(tokens), dtype=torch.bool)
        left[picked] = False
        if take and left.any():
            assert high[picked].min() >= low[left].max(), "a token with a higher score was left"


def check_assign_anchors(group, x, anchors, *, valid=None) -> None:
    assert group.shape == x.shape[:2]
    anchors = anchors.cpu()
    for b, tokens, cosine in images(x, valid):
        got = group[b].cpu()
        expected = torch.full_like(got, -1)
        usable = torch.isin(anchors[b], tokens).nonzero().flatten()
        if len(usable):
            expected[tokens] = got[tokens]  # judged below
            joined = _among(got[tokens], usable)
            rows = _among(anchors[b, usable], tokens)
            similar = cosine[:, rows]
            best = similar.amax(1)
            chosen = similar.gather(1, joined[:, None])[:, 0]
            right = torch.where(best == NEVER, joined == 0, chosen >= best - TOLERANCE)
            right[rows] = anchors[b, got[tokens]][rows] == anchors[b, usable]
            assert right.all(), "a token has a more similar anchor, or an anchor left itself"
        assert torch.equal(got, expected), "a token without an anchor must have group -1"


def check_select_diverse(picks, x, k, *, valid=None) -> None:
    assert picks.shape == (len(x), x.shape[1] if isinstance(k, Tensor) else k)
    for b, tokens, cosine in images(x, valid):
        take = max(min(_of_row(k, b), len(tokens)), 0)
        picked = _among(_filled(picks[b], take), tokens)
        assert len(picked.unique()) == take, "a token was picked twice"
        comparable = cosine.diagonal() > NEVER
        distance = 1 - cosine.fill_diagonal_(NEVER)
        reach = distance.amin(0) if take else distance
        left = torch.ones(len(tokens), dtype=torch.bool)
        for t, pick in enumerate(picked.tolist()):
            if comparable[left].any():
                rank = torch.where(comparable & left, reach, NEVER)
                assert rank[pick] >= rank.max() - TOLERANCE, f"pick {t} is not the farthest"
            else:
                assert pick == left.nonzero()[0], "of tokens that cannot be compared the first goes"
            reach = distance[pick] if t == 0 else torch.minimum(reach, distance[pick])
            left[pick] = False


def check_merge_tokens(result, x, group, num_groups, *, size=None, position=None) -> None:
    """For sizes that are whole numbers: their sums are exact."""
    merged, merged_size, merged_position = result
    assert merged.dtype == x.dtype and merged_size.dtype == torch.float32
    truth = reference.merge_tokens(x.double(), group, num_groups, size=size, position=position)
    assert_rounded_once(merged, truth[0], terms=x.shape[1])
    assert torch.equal(merged_size.double(), truth[1])
    assert torch.equal(merged_position, truth[2])


def images(x: Tensor, valid: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Row, its valid tokens, and their cosines in float64 (NEVER where a token has NaN or Inf)."""
    for b in range(len(x)):
        tokens = torch.arange(x.shape[1])
        if valid is not None:
            tokens = tokens[valid[b].cpu()]
        rows = x[b].cpu()[tokens].double()
        comparable = rows.isfinite().all(1)
        rows = torch.where(comparable[:, None], rows, 0)
        unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        never = ~(comparable[:, None] & comparable)
        yield b, tokens, (unit @ unit.T).masked_fill(never, NEVER)


def _bounds(x: Tensor, mode: str, valid: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Lowest and highest anchor score of every valid token.

    Float32 may order two nearly equal densities either way, so the rivals of a token are known but
    for a few. Copies of one token are no such few: their densities are the same bits.
    """
    for b, tokens, cosine in images(x, valid):
        n = len(tokens)
        comparable = cosine.diagonal() > NEVER
        density = cosine.masked_fill(cosine == NEVER, 0).sum(1)
        gap = density[None, :] - density[:, None] if mode == "paper" else density[:, None] - density
        blur = 1e-5 * torch.maximum(density.abs()[:, None], density.abs()) + TOLERANCE
        rows = x[b].cpu()[tokens]
        copies = (rows[:, None] == rows[None]).all(2) if n <= 64 else torch.eye(n, dtype=torch.bool)
        both = comparable & comparable[:, None]
        surely = both & (gap > blur)
        perhaps = both & (gap > -blur) & ~copies
        # The factor 1 - max cos: over the sure rivals at least, over all possible ones at most.
        most = 1 - _largest(cosine, surely)
        least = 1 - _largest(cosine, perhaps)
        alone = ~surely.any(1)  # perhaps there is no rival: then the factor is 1, else any of these
        lowest = torch.where(perhaps, cosine, 1.0).amin(1) if n else most
        most = torch.where(alone, torch.maximum(1 - lowest, torch.ones(n)), most)
        least = torch.where(alone, torch.minimum(least, torch.ones(n)), least)
        ends = torch.stack([density * most, density * least])
        slack = 1e-5 * density.abs() + TOLERANCE
        low, high = ends.amin(0) - slack, ends.amax(0) + slack
        yield low.masked_fill(~comparable, NEVER), high.masked_fill(~comparable, NEVER)


def _largest(cosine: Tensor, among: Tensor) -> Tensor:
    """The largest cosine of each row among some; where there is none 0, so that the factor is 1."""
    largest = cosine.masked_fill(~among, NEVER).amax(1) if len(cosine) else cosine.sum(1)
    return torch.where(among.any(1), largest, 0.0)


def assert_falling(value: Tensor, order: Tensor) -> None:
    """The values fall in this order, up to TOLERANCE; those that are NEVER come in index order."""
    falls = value[order]
    assert (falls[:-1] >= falls[1:] - TOLERANCE).all(), "not in falling order"
    assert (order[falls == NEVER].diff() > 0).all(), "what cannot be compared is not in index order"


def assert_mapped_back(row: Tensor, alone: Tensor, valid: Tensor | None = None) -> None:
    """A row has the indices found for its tokens alone, in the numbering of all, and padding."""
    found = alone[alone >= 0]
    expected = torch.full_like(row, -1)
    expected[: len(found)] = found if valid is None else valid.nonzero()[:, 0][found]
    assert torch.equal(row, expected)


def _of_row(budget: int | Tensor, b: int) -> int:
    return int(budget[b]) if isinstance(budget, Tensor) else budget


def _filled(row: Tensor, count: int) -> Tensor:
    """The first `count` entries; the others must be padding."""
    assert row.dtype == torch.int64
    row = row.cpu()
    assert (row[count:] == -1).all(), "what is not used must be -1"
    return row[:count]


def _among(indices: Tensor, ascending: Tensor) -> Tensor:
    """Where each index stands in an ascending list that must have it."""
    assert torch.isin(indices, ascending).all(), "an index of no valid token"
    return torch.searchsorted(ascending, indices)
