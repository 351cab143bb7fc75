"""merge_tokens against the usual formulation: index_add in float32, positions by sorting."""

import torch
from torch import Tensor

from bench.harness import main
from restore_ext import merge_tokens
from restore_ext.testing.tokens import MergeCase, check_merge_tokens


def plain_torch(
    x: Tensor, group: Tensor, num_groups: int, size: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    # Group num_groups collects what has no group.
    to = torch.where((group >= 0) & (group < num_groups), group, num_groups)
    total = size.new_zeros(B, num_groups + 1).scatter_add(1, to, size)
    merged = size.new_zeros(B, num_groups + 1, C)
    merged.scatter_add_(1, to[..., None].expand_as(x), x.float() * size[..., None])
    merged /= torch.where(total > 0, total, 1)[..., None]

    by_position = position.argsort(1)
    by_group = by_position.gather(1, to.gather(1, by_position).argsort(dim=1, stable=True))
    count = torch.zeros_like(total, dtype=torch.int64).scatter_add(1, to, torch.ones_like(to))
    median = (count.cumsum(1) - count + (count - 1).clamp(min=0) // 2).clamp(max=N - 1)
    at = position.gather(1, by_group.gather(1, median)).masked_fill(count == 0, -1)
    return merged[:, :-1].to(x.dtype), total[:, :-1], at[:, :-1]


CASES = [MergeCase(), MergeCase(M=64, C=4096), MergeCase(B=4, N=196, M=32, C=768)]

if __name__ == "__main__":
    providers = {"plain torch": plain_torch, "restore_ext": merge_tokens}
    main("merge_tokens", CASES, providers, check_merge_tokens)
