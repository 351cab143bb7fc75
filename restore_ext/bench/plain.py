"""The operators in plain torch, as one would write them: what ours are held against."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from restore_ext import reference
from restore_ext.testing.paged import contiguous

BIAS = ("log_size", "query_position", "key_position", "decay", "causal", "key_range")
Given = dict[str, Any]


def pairs(best: Tensor, partner: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    order = best.argsort(dim=-1, descending=True, stable=True)
    src, left = order[:, :r], order[:, r:]
    return 2 * left, 2 * src, 2 * partner.gather(1, src) + 1


def nearest(x: Tensor, anchors: Tensor) -> Tensor:
    return x @ x.gather(1, anchors[..., None].expand(-1, -1, x.shape[2])).mT


def own(group: Tensor, anchors: Tensor) -> Tensor:
    """An anchor belongs to itself."""
    return group.scatter(
        1, anchors, torch.arange(anchors.shape[1], device=group.device).expand_as(anchors)
    )


def match_bipartite(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    unit = normalize(metric.float(), dim=-1)
    return pairs(*(unit[:, ::2] @ unit[:, 1::2].mT).max(-1), r)


def assign_anchors(x: Tensor, anchors: Tensor) -> Tensor:
    return own(nearest(normalize(x.float(), dim=-1), anchors).argmax(-1), anchors)


def score_anchors(x: Tensor) -> Tensor:
    return reference.score_anchors(x.float())


def select_anchors(x: Tensor, k: int) -> Tensor:
    return reference.score_anchors(x.float()).topk(k).indices.sort().values


def select_diverse(x: Tensor, k: int) -> Tensor:
    unit = normalize(x.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    rows, apart = torch.arange(len(x), device=x.device), torch.eye(x.shape[1], device=x.device)
    pick = (distance + 9 * apart).amin(1).argmax(1)
    picks, reach = [pick], distance[rows, pick]
    while len(picks) < k:
        reach[rows, pick] = -1
        pick = reach.argmax(1)
        picks.append(pick)
        reach = torch.minimum(reach, distance[rows, pick])
    return torch.stack(picks, 1)


def merged_with(total: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[..., Any]:
    """merge_tokens in plain torch; total(rows [B, N, C], group [B, N], M) sums rows by group."""

    def merge(
        x: Tensor, group: Tensor, num_groups: int, size: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, M = x.shape[1], num_groups
        to = torch.where((group >= 0) & (group < M), group, M)  # group M collects what has none
        sizes = total(size[..., None], to, M + 1)[..., 0]
        merged = total(x.float() * size[..., None], to, M + 1)
        merged = merged / torch.where(sizes > 0, sizes, 1)[..., None]

        by_position = position.argsort(1)
        by_group = by_position.gather(1, to.gather(1, by_position).argsort(dim=1, stable=True))
        count = torch.zeros_like(sizes, dtype=torch.int64).scatter_add(1, to, torch.ones_like(to))
        median = (count.cumsum(1) - count + (count - 1).clamp(min=0) // 2).clamp(max=N - 1)
        at = position.gather(1, by_group.gather(1, median)).masked_fill(count == 0, -1)
        return merged[:, :-1].to(x.dtype), sizes[:, :-1], at[:, :-1]

    return merge


def by_scatter_add(rows: Tensor, group: Tensor, count: int) -> Tensor:
    total = rows.new_zeros(len(rows), count, rows.shape[2])
    return total.scatter_add_(1, group[..., None].expand_as(rows), rows)


def row_scores(**given: Any) -> Tensor:
    return reference.row_scores(**given | {k: given[k].float() for k in ("query", "key")})


def mask_of(given: Given) -> Tensor | None:
    """The bias as SDPA takes it; its rows begin at addresses that its kernels like."""
    if given["log_size"] is None and given["decay"] is None:
        return None
    query, Lk = given["query"], given["key"].shape[2]
    shape = (len(query), query.shape[2], Lk)
    bias = reference.attention_bias(*shape, **{n: given[n] for n in BIAS}, device=query.device)
    return pad(bias.to(query.dtype), (0, -Lk % 8))[..., :Lk]


def by_sdpa(given: Given, mask: Tensor | None) -> Tensor:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    alone = mask is None and query.shape[2] > 1
    shared = query.shape[1] != key.shape[1]  # some backends refuse the word alone
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=alone, enable_gqa=shared
    )


def calibrated_attention(**given: Any) -> Tensor:
    return by_sdpa(given, mask_of(given))


def calibrated_attention_paged(**given: Any) -> Tensor:
    """Gathers the pages first."""
    return calibrated_attention(**contiguous(given))


merge_tokens = merged_with(by_scatter_add)
