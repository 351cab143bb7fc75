"""How a stage chooses: by score, evenly, by a stride; and what becomes of the others."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from restore_ext import ops
from restore_ext.rows import falling, ranks
from restore_ext.stages.stage import Candidates, Request, Stage, as_groups


def highest(tokens: Candidates, which: int = 0) -> Tensor:
    """[I, N] bool: the counts[which] tokens of the highest score, ties to the lowest index."""
    scores = tokens.scores.masked_fill(~tokens.valid, float("-inf"))
    return (ranks(falling(scores)) < tokens.counts[which][:, None]) & tokens.valid


def evenly(tokens: Candidates, which: int = 0) -> Tensor:
    """[I, N] bool: token floor((2 i + 1) n / (2 k)) of n, i = 0..k-1: middles of equal parts."""
    n, k = tokens.valid.sum(1, keepdim=True), tokens.counts[which][:, None]
    i = torch.arange(tokens.most[which], device=n.device)
    # What a row has too many of goes to a column of its own.
    picks = torch.where(i < k, (2 * i + 1) * n // (2 * k).clamp(min=1), tokens.valid.shape[1])
    kept = torch.zeros_like(tokens.valid)
    return torch.cat([kept, kept[:, :1]], 1).scatter(1, picks, True)[:, :-1]


def every(tokens: Candidates, offset: Tensor, stride: int) -> Tensor:
    """[I, N] bool: tokens offset, offset + stride, ... of an image, offset [I]."""
    behind = torch.arange(tokens.valid.shape[1], device=offset.device) - offset[:, None]
    return tokens.valid & (behind >= 0) & (behind % stride == 0)


Pick = Callable[[Candidates, int], Tensor]


def make_stage(
    layer: int, count: Callable[[int, int], int], scores: str, merge: bool, request: Request
) -> Stage:
    """The stage that keeps `count` tokens: the highest scores, or even ones where there are none.

    merge  the others are not dropped. As in reduce_tokens, the scores have int(retain * count)
           places, and what is left is merged into distinctive anchors among it.
    """
    pick: Pick = evenly if scores == "none" else highest
    if not merge:
        return Stage(layer, lambda n, now: (count(n, now),), partial(_kept, pick=pick), scores)

    def counts(n: int, now: int) -> tuple[int, int, int]:
        after = count(n, now)
        retained = after if after == now else int(request.retain * after)
        return after, retained, after - retained

    select = partial(_anchored, pick=pick, mode=request.anchor_mode)
    return Stage(layer, counts, select, scores, merges=True)


def _kept(tokens: Candidates, pick: Pick) -> Tensor:
    return as_groups(pick(tokens, 0))


def _anchored(tokens: Candidates, pick: Pick, mode: str) -> Tensor:
    kept = pick(tokens, 1)
    group = as_groups(kept)
    _, retained, anchors = tokens.counts
    if tokens.most[2] == 0:
        return group
    x, rest = tokens.hidden(), tokens.valid & ~kept
    if mode == "uniform":
        at = evenly_among(rest, anchors, tokens.most[2])
    else:
        budget = anchors.int()
        at = ops.select_anchors(x, budget, mode=mode, valid=rest, max_k=tokens.most[2])
    cluster = ops.assign_anchors(x, at, valid=rest)
    return torch.where(rest & (cluster >= 0), retained[:, None] + cluster, group)


def evenly_among(rest: Tensor, k: Tensor, most: int) -> Tensor:
    """Evenly spaced tokens [I, most] among those of `rest` [I, N]; -1 beyond the k [I] of a row."""
    order = rest.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    i = torch.arange(most, device=k.device)
    middle = (2 * i + 1) * rest.sum(1, keepdim=True) // (2 * k[:, None]).clamp(min=1)
    at = order.gather(1, middle.clamp(max=rest.shape[1] - 1))
    return torch.where(i < k[:, None], at, -1)


def share_of(n: int, share: float) -> int:
    """A share of n tokens, to the nearest; at least one, unless it is zero."""
    return max(1, round(share * n)) if share else 0
