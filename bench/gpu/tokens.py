"""What the token operators are held against on a GPU, and the sizes of the problems there.

What the released codes compute in half precision, they compute so here, too: their picks differ
from ours in near-ties, which the rows say. Written from descriptions; no line is copied.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.provider import Given, Peer, compiled, need
from restore_ext.bench.plain import nearest, own, pairs, score_anchors

# N tokens of C channels: LLaVA-1.5 before and after its projector, LLaVA-NeXT, a batch, a video.
SIZES: list[dict[str, int]] = [
    {"N": 576, "C": 1024},
    {"N": 576, "C": 4096},
    {"N": 2880, "C": 4096},
    {"B": 64, "N": 576, "C": 4096},
    {"N": 2880, "C": 1024},
    {"N": 8192, "C": 3584},
]
TINY: list[dict[str, int]] = [{"N": 30, "C": 16}, {"B": 2, "N": 29, "C": 24}]


def compiled_form(fn: Callable[..., Any]) -> Peer:
    """The same under torch.compile, which is done before the clock starts."""

    def make(**given: Any) -> Callable[[], Any]:
        device = next(t.device for t in given.values() if isinstance(t, Tensor))
        return partial(compiled(fn, device), **given)

    return Peer(make)


def half(fn: Callable[..., Any], **more: Any) -> Peer:
    """In the inputs' own dtype throughout, as the released codes do."""
    return Peer(lambda **given: partial(fn, **given), lambda given: given | more, exact=False)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def released_match(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    x = unit(metric)
    return pairs(*(x[:, ::2] @ x[:, 1::2].mT).max(-1), r)


def match_units(**given: Any) -> Callable[[], Any]:
    """Tokens of length 1 to begin with: the product, its maxima and their order alone."""
    x, r = unit(given["metric"]), given["r"]
    even, odd = x[:, ::2].contiguous(), x[:, 1::2].contiguous()
    return lambda: pairs(*(even @ odd.mT).max(-1), r)


def released_assign(x: Tensor, anchors: Tensor) -> Tensor:
    x = unit(x)
    return own(nearest(x, anchors).argmax(-1), anchors)


def assign_units(**given: Any) -> Callable[[], Tensor]:
    x, anchors = unit(given["x"]), given["anchors"]
    chosen = x.gather(1, anchors[..., None].expand(-1, -1, x.shape[2]))
    return lambda: own((x @ chosen.mT).argmax(-1), anchors)


def flash_kmeans_assign(**given: Any) -> Callable[[], Tensor]:
    library = need("flash_kmeans.assign_euclid_triton", given["x"])
    x, anchors = unit(given["x"]), given["anchors"]
    chosen = x.gather(1, anchors[..., None].expand(-1, -1, x.shape[2])).contiguous()
    return lambda: own(library.cosine_assign_triton(x, chosen).long(), anchors)


def released_scores(x: Tensor, mode: str = "official") -> Tensor:
    similarity = unit(x) @ unit(x).mT
    density = similarity.sum(-1)
    rivals = density[:, None, :] < density[:, :, None]
    most = torch.where(rivals, similarity, -1.0).amax(-1)
    return (density * (1 - torch.where(most == -1, 0.0, most))).float()


def released_anchors(x: Tensor, k: int, mode: str = "official") -> Tensor:
    return released_scores(x).topk(k).indices.sort().values


def topk_of_scores(**given: Any) -> Callable[[], Tensor]:
    """torch.topk and the order of the picks alone, of scores that are there already."""
    scores, k = score_anchors(given["x"]), given["k"]
    return lambda: scores.topk(k).indices.sort().values


def released_diverse(x: Tensor, k: int) -> Tensor:
    """Every step takes the minimum over all picks anew."""
    distance = 1 - unit(x) @ unit(x).mT
    picks = [distance.topk(2, dim=1, largest=False).values[:, 1].argmax(1)]
    while len(picks) < k:
        rows = torch.stack(picks, 1)[..., None].expand(-1, -1, x.shape[1])
        picks.append(distance.gather(1, rows).amin(1).argmax(1))
    return torch.stack(picks, 1)


def by_scatter_reduce(rows: Tensor, group: Tensor, count: int) -> Tensor:
    total = rows.new_zeros(len(rows), count, rows.shape[2])
    return total.scatter_reduce_(1, group[..., None].expand_as(rows), rows, "sum")


def by_index_add(rows: Tensor, group: Tensor, count: int) -> Tensor:
    B, _, C = rows.shape
    flat = group + count * torch.arange(B, device=rows.device)[:, None]
    total = rows.new_zeros(B * count, C).index_add_(0, flat.flatten(), rows.flatten(0, 1))
    return total.view(B, count, C)


def released_merge(
    x: Tensor, group: Tensor, num_groups: int, size: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Membership as a dense matrix: a product for the mean, a sort of all of it for the median."""
    there = (group >= 0) & (group < num_groups)
    members = one_hot(torch.where(there, group, num_groups), num_groups + 1)[..., :-1].mT.bool()
    weight = members * size[:, None]
    total, count = weight.sum(-1), members.sum(-1)
    merged = weight.to(x.dtype) @ x / torch.where(total > 0, total, 1)[..., None].to(x.dtype)
    last = torch.iinfo(torch.int64).max
    at = torch.where(members, position[:, None], last).sort(-1).values
    median = at.gather(2, ((count - 1).clamp(min=0) // 2)[..., None])[..., 0]
    return merged, total, median.masked_fill(count == 0, -1)


def token_cost(pairs_of_tokens: Callable[[Given], float]) -> Callable[[Given], tuple[float, float]]:
    """A cosine of each of so many pairs, and the tokens read once."""

    def cost(given: Given) -> tuple[float, float]:
        x = given["metric"] if "metric" in given else given["x"]
        return 2.0 * pairs_of_tokens(given) * x.shape[2], float(x.numel() * x.element_size())

    return cost


def square(given: Given) -> float:
    """All pairs, though half of them would do: as others count."""
    B, N, _ = given["x"].shape
    return float(B * N * N)


def merge_cost(given: Given) -> tuple[float, float]:
    x, M = given["x"], given["num_groups"]
    wide = x.numel() + len(x) * M * x.shape[2]
    return 2.0 * x.numel(), float(wide * x.element_size())
