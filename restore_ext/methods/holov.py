"""HoloV: every part of the picture gets its share of the budget."""

import torch
from torch import Tensor

from restore_ext.checks import require_count
from restore_ext.methods.problem import CLS, Method, Problem
from restore_ext.rows import falling, ranks, where_true

ALPHA = 0.09  # weight of the variance against attention
NORM_EPSILON = 1e-6


def select(problem: Problem, budget: int, *, num_chunks: int = 16) -> Tensor:
    """The budget split over contiguous chunks, each of which keeps its highest scores.

    Source: HoloV, arXiv 2510.02912, with the exact budget of RESTORE's variant, arXiv 2606.01711.
    N tokens make min(num_chunks, N) chunks in raster order, the first N mod num_chunks one longer.
    A chunk of p tokens, S its cosine similarities with a zero diagonal, a = 1000 * score:

        mean_i  = sum_j S_ij / (p - 1)           variance_i = sum_j (S_ij - mean_i)^2 / (p - 1)
        weight  = mean(a + 0.09 * variance * mean|a| / (mean|variance| + 1e-6))

    Chunks get floor(budget * weight / sum of weights) tokens, what is left one each to the highest
    weights. What exceeds a chunk's length goes to the chunks with room, the highest weight first.
    A lone token has variance 0; weights below 0 count as 0; if all are 0 the chunks are equal.
    """
    B, N, _ = problem.metric.shape
    chunk, place, mask = _chunks(N, num_chunks, problem.metric.device)
    length = mask.sum(1)  # [G]
    scores = problem.scores.new_zeros(B, *mask.shape)  # [B, G, P], chunks padded on the right
    scores[:, chunk, place] = problem.scores

    weight = _weights(problem.metric, scores, chunk, place, mask)
    allocated = _allocate(weight, length, budget)
    order = falling(scores.masked_fill(~mask, float("-inf")))
    rank = ranks(order.flatten(0, 1)).view_as(order)
    return where_true((rank < allocated[..., None])[:, chunk, place], budget)


def _chunks(N: int, num_chunks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk of every token [N], its place there [N], and which places exist [G, P]."""
    G = min(num_chunks, N)
    short, longer = divmod(N, G)
    index = torch.arange(N, device=device)
    border = longer * (short + 1)  # tokens before it lie in the longer chunks
    in_longer = index < border
    chunk = torch.where(in_longer, index // (short + 1), longer + (index - border) // short)
    place = torch.where(in_longer, index % (short + 1), (index - border) % short)
    width = short + (longer > 0)
    length = short + (torch.arange(G, device=device) < longer)
    return chunk, place, torch.arange(width, device=device) < length[:, None]


def _weights(metric: Tensor, scores: Tensor, chunk: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """The weight of every chunk, [B, G]."""
    x = metric.new_zeros(len(metric), *mask.shape, metric.shape[2], dtype=torch.float32)
    x[:, chunk, place] = metric.float()
    unit = x / (x.norm(dim=-1, keepdim=True) + NORM_EPSILON)
    self_pair = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    similarity = (unit @ unit.mT).masked_fill(self_pair, 0)  # [B, G, P, P]
    length = mask.sum(1)
    others = (length - 1).clamp(min=1)[:, None]
    mean = similarity.sum(-1) / others
    spread = (similarity - mean[..., None]).square().masked_fill(~mask[:, None, :], 0)
    variance = (spread.sum(-1) / others).masked_fill(~mask, 0)
    attention = 1e3 * scores
    mean_attention, mean_variance = attention.sum(-1) / length, variance.sum(-1) / length
    scale = (attention.abs().sum(-1) / length) / (mean_variance + 1e-6)
    return (mean_attention + ALPHA * scale * mean_variance).clamp(min=0)


def _allocate(weight: Tensor, length: Tensor, budget: int) -> Tensor:
    """The tokens of every chunk [B, G]: at most its length, budget in all."""
    total = weight.sum(-1, keepdim=True)
    share = torch.where(total > 0, weight / total, 1 / weight.shape[1])
    allocated = (share * budget).floor().long()
    order = falling(share)
    left = budget - allocated.sum(-1, keepdim=True)
    allocated = allocated + (ranks(order) < left)
    room = (length - allocated).clamp(min=0).gather(1, order)
    allocated = allocated.minimum(length)
    overflow = budget - allocated.sum(-1, keepdim=True)
    filled_before = room.cumsum(-1) - room
    extra = (overflow - filled_before).clamp(min=0).minimum(room)
    return allocated.scatter_add(1, order, extra)


HOLOV = Method(
    select,
    scores=CLS,
    options={"num_chunks": require_count},
    source="2510.02912",
    about="the highest attention of the CLS token in every part of the picture",
)
