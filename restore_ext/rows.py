"""Index arithmetic on [B, N]: the words the methods and the reduction are written in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of numbers of the host, without the wait that torch.tensor(device=...) ends with."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x [B, N, ...] named by index [B, K], as [B, K, ...]."""
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def where_true(mask: Tensor, count: int) -> Tensor:
    """The indices [B, count], ascending, of the `count` True in every row of mask [B, N]."""
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def rename(group: Tensor, names: Tensor) -> Tensor:
    """Group ids [B, N] by their new names [B, M]; -1 stays -1."""
    with_none = torch.cat([names, names.new_full((len(names), 1), -1)], 1)
    return with_none.gather(1, torch.where(group < 0, names.shape[1], group))


def ranks(order: Tensor) -> Tensor:
    """The place of every index in a permutation [B, N]: its inverse."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def falling(scores: Tensor) -> Tensor:
    """The order of falling scores along the last dimension; ties in rising index."""
    return scores.argsort(dim=-1, descending=True, stable=True)
