"""What every operator means, in plain PyTorch. This is the specification: it imports torch alone.

A reference computes in the dtype it is given: hand it float64 and it is the truth. It is written to
be read, one row at a time where rows may differ, and stores N x N matrices that no kernel stores.

Three rules hold for every similarity (cosine): a zero vector has similarity 0 to everything; a
vector with NaN or Inf in it ranks below every other; ties go to the lowest index. A token whose
`valid` is False takes no part: the result is that of the row without it, with indices mapped back.
"""

import torch
from torch import Tensor

NEVER = float("-inf")


def match_bipartite(
    metric: Tensor,
    r: int | Tensor,
    *,
    valid: Tensor | None = None,
    class_token: bool = False,
    max_r: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = metric.shape
    protected = int(class_token)
    ragged = valid is not None or isinstance(r, Tensor)
    R = max(min(_width(r, max_r, N), (N - protected) // 2), 0)
    U = (N + 1) // 2 if ragged else (N + 1) // 2 - R
    unmerged, src, dst = (metric.new_full((B, w), -1, dtype=torch.int64) for w in (U, R, R))
    for b, tokens in enumerate(_tokens(metric, valid)):
        n = len(tokens)
        even, odd = tokens[::2], tokens[1::2]
        take = max(min(_of_row(r, b), R, (n - protected) // 2), 0)
        if len(odd):
            similarity = _similarity(metric[b, even], metric[b, odd])
            partner = odd[similarity.argmax(1)]
            best = similarity.amax(1)[protected:]
        else:
            partner, best = even, metric.new_full((len(even) - min(protected, n),), NEVER)
        order = best.argsort(descending=True, stable=True) + protected
        left = order[take:]
        if class_token:
            left = torch.cat([order.new_zeros(min(1, n)), left.sort().values])
        src[b, :take] = even[order[:take]]
        dst[b, :take] = partner[order[:take]]
        unmerged[b, : len(left)] = even[left]
    return unmerged, src, dst


def score_anchors(x: Tensor, *, mode: str = "paper", valid: Tensor | None = None) -> Tensor:
    unit, comparable = _unit(x)
    if valid is not None:
        comparable = comparable & valid
    unit = unit * comparable[..., None]
    similarity = unit @ unit.mT  # [B, N, N]
    # [B, N], each token counts itself. Summed by rows: to a matmul, copies of a token may differ.
    density = (unit * unit.sum(1, keepdim=True)).sum(-1)
    if mode == "paper":
        superior = density[:, None, :] > density[:, :, None]
    else:  # the released code compares with less dense tokens
        superior = density[:, None, :] < density[:, :, None]
    superior = superior & comparable[:, None, :]
    nearest = similarity.masked_fill(~superior, NEVER).amax(-1) if x.shape[1] else density
    distinct = torch.where(superior.any(-1), 1 - nearest, torch.ones_like(nearest))
    return (density * distinct).masked_fill(~comparable, NEVER)


def select_anchors(
    x: Tensor,
    k: int | Tensor,
    *,
    mode: str = "paper",
    valid: Tensor | None = None,
    max_k: int | None = None,
) -> Tensor:
    score = score_anchors(x, mode=mode, valid=valid)
    anchors = x.new_full((len(x), _width(k, max_k, x.shape[1])), -1, dtype=torch.int64)
    for b, tokens in enumerate(_tokens(x, valid)):
        take = max(min(_of_row(k, b), anchors.shape[1], len(tokens)), 0)
        order = score[b, tokens].argsort(descending=True, stable=True)
        anchors[b, :take] = tokens[order[:take]].sort().values
    return anchors


def assign_anchors(x: Tensor, anchors: Tensor, *, valid: Tensor | None = None) -> Tensor:
    B, N, _ = x.shape
    group = x.new_full((B, N), -1, dtype=torch.int64)
    for b, tokens in enumerate(_tokens(x, valid)):
        usable = torch.isin(anchors[b], tokens).nonzero().flatten()  # drops the padding
        if not len(usable):
            continue
        at = anchors[b, usable]
        group[b, tokens] = usable[_similarity(x[b, tokens], x[b, at]).argmax(1)]
        group[b, at.flip(0)] = usable.flip(0)  # an anchor is its own; of two alike the first
    return group


def merge_tokens(
    x: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    size: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, C = x.shape
    merged = x.new_zeros(B, num_groups, C)
    merged_size = x.new_zeros(B, num_groups)
    merged_position = group.new_full((B, num_groups), -1)
    for b in range(B):
        for m in range(num_groups):
            members = (group[b] == m).nonzero().flatten()
            if not len(members):
                continue
            weight = x.new_ones(len(members)) if size is None else size[b, members].to(x.dtype)
            merged_size[b, m] = weight.sum()
            if merged_size[b, m] > 0:
                merged[b, m] = weight / merged_size[b, m] @ x[b, members]
            at = members if position is None else position[b, members]
            merged_position[b, m] = at.sort().values[(len(members) - 1) // 2]  # the lower median
    return merged, merged_size, merged_position


def select_diverse(
    x: Tensor, k: int | Tensor, *, valid: Tensor | None = None, max_k: int | None = None
) -> Tensor:
    picks = x.new_full((len(x), _width(k, max_k, x.shape[1])), -1, dtype=torch.int64)
    for b, tokens in enumerate(_tokens(x, valid)):
        take = max(min(_of_row(k, b), picks.shape[1], len(tokens)), 0)
        unit, comparable = _unit(x[b, tokens])
        distance = 1 - unit @ unit.mT
        free = torch.ones_like(comparable)
        # First the token whose nearest neighbour is farthest, then the farthest from all picked.
        self_apart = torch.diag(distance.new_full((len(tokens),), float("inf")))
        reach = (distance + self_apart).masked_fill(~comparable[:, None], float("inf"))
        reach = reach.amin(0) if take else reach
        for t in range(take):
            rank = torch.where(comparable, reach, -1.0).masked_fill(~free, -2.0)
            pick = rank.argmax()
            picks[b, t] = tokens[pick]
            free[pick] = False
            reach = torch.full_like(reach, float("inf")) if t == 0 else reach
            reach = torch.minimum(reach, distance[pick]) if comparable[pick] else reach
    return picks


def calibrated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_size: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    decay: Tensor | None = None,
    causal: bool = True,
    key_range: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if log_size is not None:  # what lies under padding, NaN even, is never read
        value = value.masked_fill((log_size == NEVER)[:, None, :, None], 0)
    bias = attention_bias(
        len(query),
        query.shape[2],
        key.shape[2],
        log_size=log_size,
        query_position=query_position,
        key_position=key_position,
        decay=decay,
        causal=causal,
        key_range=key_range,
        dtype=query.dtype,
        device=query.device,
    )
    logit = _logits(query, key, bias, log_size, softcap, scale)
    lse = logit.logsumexp(-1)
    share = torch.where(lse[..., None] == NEVER, 0, (logit - lse[..., None]).exp())
    out = share @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return (out, lse) if return_lse else out


def calibrated_attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    *,
    log_size: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    decay: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    pages, page = key_cache.shape[:2]
    out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], NEVER)
    for b in range(len(query)):
        length = min(max(int(seqlens[b]), 0), block_table.shape[1] * page)
        index = torch.arange(length, device=query.device)
        listed = block_table[b, index // page].long()
        exists = (listed >= 0) & (listed < pages)
        if not exists.any():
            continue
        slot = torch.where(exists, listed * page + index % page, 0)  # [length]
        size = query.new_zeros(length) if log_size is None else log_size.flatten()[slot]
        at_query = at_key = None
        if query_position is not None and key_position is not None:
            at_query, at_key = query_position[b, None], key_position.flatten(-2)[..., slot][None]
        rows = calibrated_attention(
            query[b, None],
            key_cache.flatten(0, 1)[slot].transpose(0, 1)[None],
            value_cache.flatten(0, 1)[slot].transpose(0, 1)[None],
            log_size=size.masked_fill(~exists, NEVER)[None],
            query_position=at_query,
            key_position=at_key,
            decay=decay,
            softcap=softcap,
            scale=scale,
            return_lse=True,
        )
        out[b], lse[b] = rows[0][0], rows[1][0]
    return (out, lse) if return_lse else out


def row_scores(
    query: Tensor,
    key: Tensor,
    *,
    weight: Tensor | None = None,
    log_size: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    decay: Tensor | None = None,
    key_range: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    B, _, R, _ = query.shape
    bias = attention_bias(
        B,
        R,
        key.shape[2],
        log_size=log_size,
        query_position=query_position,
        key_position=key_position,
        decay=decay,
        causal=False,
        key_range=key_range,
        dtype=query.dtype,
        device=query.device,
    )
    logit = _logits(query, key, bias, log_size, softcap, scale)
    blind = (logit == NEVER).all(-1, keepdim=True)
    share = torch.where(blind | (bias == NEVER), 0, logit.softmax(-1))  # [B, Hq, R, K]
    if weight is None:
        weight = query.new_full((B, R), 1 / max(R, 1))
    weight = weight.to(query.dtype)[..., None]  # [B, R, 1]
    return torch.where(weight == 0, 0, weight * share.mean(1)).sum(1)


def attention_bias(
    B: int,
    Lq: int,
    Lk: int,
    *,
    log_size: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    decay: Tensor | None = None,
    causal: bool = True,
    key_range: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """What calibrated attention adds to its logits, [B, 1, Lq, Lk]; -inf where a key is unseen."""
    rows = torch.arange(Lq, device=device)[:, None] + (Lk - Lq)
    columns = torch.arange(Lk, device=device)
    bias = torch.zeros(B, 1, Lq, Lk, dtype=dtype, device=device)
    if log_size is not None:
        bias = bias + log_size.to(dtype)[:, None, None, :]
    if decay is not None:
        table = decay.to(dtype).reshape(-1, decay.shape[-1])  # [G, P]
        at_query = _axes(query_position, rows[:, 0], B)
        at_key = _axes(key_position, columns, B)
        distance = (at_query[..., :, None] - at_key[..., None, :]).abs()  # [B, G, Lq, Lk]
        distance = distance.clamp(max=table.shape[-1] - 1).long().expand(-1, len(table), -1, -1)
        rho = sum((table[g][distance[:, g]] for g in range(len(table))), start=table.new_zeros(()))
        bias = bias + torch.log(2 - rho)[:, None]
    if causal:
        bias = bias.masked_fill(columns > rows, NEVER)
    if key_range is not None:
        first, past = key_range[:, None, :, :1], key_range[:, None, :, 1:]
        bias = bias.masked_fill((columns < first) | (columns >= past), NEVER)
    return bias


def _logits(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    log_size: Tensor | None,
    softcap: float,
    scale: float | None,
) -> Tensor:
    """[B, Hq, Lq, Lk]; -inf where a key is unseen, whatever lies there."""
    if log_size is not None:
        key = key.masked_fill((log_size == NEVER)[:, None, :, None], 0)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logit = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap > 0:
        logit = softcap * torch.tanh(logit / softcap)
    return torch.where(bias == NEVER, NEVER, logit + bias)  # NaN, if seen, makes its row NaN


def _axes(position: Tensor | None, index: Tensor, B: int) -> Tensor:
    """Positions as [B, G, L]: one axis unless they come with several, the index where absent."""
    if position is None:
        return index.expand(B, 1, -1)
    return position if position.dim() == 3 else position[:, None]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and which rows can be compared; zero rows and the others become zeros."""
    norm = x.norm(dim=-1, keepdim=True)
    comparable = norm.isfinite()
    return torch.where(comparable & (norm > 0), x / norm, 0), comparable[..., 0]


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    (a, a_comparable), (b, b_comparable) = _unit(a), _unit(b)
    return (a @ b.mT).masked_fill(~(a_comparable[:, None] & b_comparable), NEVER)


def _tokens(x: Tensor, valid: Tensor | None) -> list[Tensor]:
    """The indices of the valid tokens, row by row."""
    everything = torch.arange(x.shape[1], device=x.device)
    return [everything if valid is None else everything[valid[b]] for b in range(len(x))]


def _width(budget: int | Tensor, most: int | None, N: int) -> int:
    if isinstance(budget, Tensor):
        return N if most is None else most
    return budget


def _of_row(budget: int | Tensor, b: int) -> int:
    return int(budget[b]) if isinstance(budget, Tensor) else budget
