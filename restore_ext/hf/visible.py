"""Which keys a query sees, where that is more or less than all those up to its own."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from restore_ext.hf.cache import Side


@dataclass(frozen=True)
class Blocks:
    """Runs of tokens that see each other, forward too: images, or the prompt before its answer."""

    first: Tensor  # [B, T] int64, the index of the first token of a token's block: of its own
    past: Tensor  # [B, T] int64, one more than that of the last

    @staticmethod
    def of(number: Tensor) -> "Blocks":
        """number [B, T] int64: neighbours of one number are a block, -1 is a block of its own."""
        B, T = number.shape
        index = torch.arange(T, device=number.device).expand(B, T)
        starts = (number < 0) | (number != pad(number, (1, 0), value=-1)[:, :-1])
        first = torch.where(starts, index, 0).cummax(1).values
        following = torch.where(starts, index, T)[:, 1:]
        past = pad(following, (0, 1), value=T).flip(1).cummin(1).values.flip(1)
        return Blocks(first, past)


def key_range(
    side: Side,
    query_position: Tensor,
    *,
    window: int | None,
    blocks: Blocks | None,
    window_cuts_blocks: bool,
) -> Tensor | None:
    """[B, T, 2] int32, the first and past-last key of every query; None where it is causal alone.

    A reduced sequence has gaps, but is in order: what was an interval of tokens is one of keys.

    side                of the K keys, the queries' own T last
    query_position      [B, 1, T] int32
    window              how many positions back a query sees, its own included
    blocks              of the T new tokens
    window_cuts_blocks  whether the window holds within a block too
    """
    if window is None and blocks is None:
        return None
    B, _, T = query_position.shape
    K = side.log_size.shape[-1]
    own = torch.arange(K - T, K, device=query_position.device).expand(B, T)
    first, past = torch.zeros_like(own), own + 1
    if window is not None:
        # Padding has whatever position: that of the key before keeps the order.
        padding = side.log_size == float("-inf")
        position = side.position[:, 0].masked_fill(padding, torch.iinfo(torch.int32).min)
        position = position.cummax(-1).values
        oldest = query_position[:, 0] - window
        first = torch.searchsorted(position, oldest.contiguous(), right=True)
    if blocks is not None:
        past = torch.maximum(past, blocks.past + K - T)
        if not window_cuts_blocks:
            first = torch.minimum(first, blocks.first + K - T)
    return torch.stack([first, past], -1).int()
