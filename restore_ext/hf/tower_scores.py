"""What the attention of a vision tower says of its patches, by its queries and keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from restore_ext import checks, ops

_ROWS = 64  # queries at a time, where there is no operator: no N x N matrix stands


@dataclass(frozen=True)
class Sight:
    """Which of N keys the queries see; all of them if nothing is said."""

    mask: Tensor | None = None  # [B or 1, 1, N or 1, N], bool or what is added to the logits
    key_range: Tensor | None = None  # [1, N, 2] int32, first and past-last key of every query

    @classmethod
    def of(cls, mask: Any, kwargs: Mapping[str, Any], N: int) -> "Sight":
        """From what an attention function is told: no mask, one that sdpa or eager adds, padding
        [B, N] or bounds of packed images for flash attention, a BlockMask for flex attention."""
        bounds = kwargs.get("cu_seq_lens_k")
        if mask is None and bounds is not None:
            index = torch.arange(N, device=bounds.device)
            image = torch.bucketize(index, bounds[1:], right=True)
            return cls(key_range=torch.stack([bounds[image], bounds[image + 1]], -1)[None].int())
        if isinstance(mask, BlockMask):
            device = mask.kv_indices.device
            return cls(create_mask(mask.mask_mod, mask.shape[0], None, N, N, device))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return cls(mask[:, None, None].bool())
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 4):
            return cls(mask)
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"the vision tower's attention mask must be [B, N], [B, 1, N, N] or a BlockMask for a "
            f"method that reads its attention, got {got}; choose a method that needs no scores"
        )

    @property
    def of_pairs(self) -> bool:
        """Whether queries see what only a matrix can tell."""
        return self.mask is not None and self.mask.shape[2] > 1

    @property
    def log_size(self) -> Tensor | None:
        """[B or 1, N] float32, what a mask that is the same for all queries adds to the logits."""
        if self.mask is None:
            return None
        seen = allowed(self.mask)
        bias = torch.zeros_like(seen, dtype=torch.float32) if seen is self.mask else self.mask
        return bias.float().masked_fill(~seen, float("-inf"))[:, 0, 0]

    def masked(self, logits: Tensor, first: int) -> Tensor:
        """Logits [B, H, T, N] of the queries from `first` on."""
        rows, mask = slice(first, first + logits.shape[2]), self.mask
        if self.key_range is not None:
            key = torch.arange(logits.shape[3], device=logits.device)
            begin, end = self.key_range[:, None, rows].unbind(-1)
            mask = (key >= begin[..., None]) & (key < end[..., None])
        elif mask is None:
            return logits
        elif self.of_pairs:
            mask = mask[:, :, rows]
        if mask.dtype != torch.bool:
            logits = logits + mask
        return logits.masked_fill(~allowed(mask), torch.finfo(logits.dtype).min)

    def queries_of(self, keys: int) -> Tensor | int:
        """[B or 1, N] how many queries see each key, at least 1; one number for all of them."""
        if self.key_range is not None:
            begin, end = self.key_range.unbind(-1)
            return end - begin  # of the image, to which the key belongs too
        if self.mask is None:
            return keys
        return allowed(self.mask).expand(-1, 1, keys, -1).sum((1, 2)).clamp(min=1)


ALL = Sight()


def cls_attention(query: Tensor, key: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
    """The CLS token's attention to the others, averaged over heads: [B, H, N+1, D] to [B, N]
    float32."""
    return _summed(query[:, :, :1], key, scale, sight)[:, 1:]


def received_attention(query: Tensor, key: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
    """What every token gets, averaged over heads and over the queries that see it: [B, H, N, D] to
    [B, N] float32."""
    return _summed(query, key, scale, sight) / sight.queries_of(key.shape[2])


def received_from_all(query: Tensor, key: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
    """What every token but the CLS token gets, its attention among them: [B, H, N+1, D] to [B, N]
    float32."""
    return received_attention(query, key, scale, sight)[:, 1:]


def allowed(mask: Tensor) -> Tensor:
    """A mask of stock, bool or what is added to the logits, as bool: True where a key is seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _summed(query: Tensor, key: Tensor, scale: float, sight: Sight) -> Tensor:
    """[B, N] what the first R queries [B, H, R, D] attend to, averaged over heads and summed."""
    B, _, R, D = query.shape
    served = query.dtype in checks.FLOATING and D in checks.OP_HEAD_SIZES and not sight.of_pairs
    if served and checks.why_no_kernels(query.device) is None:
        log_size, key_range = sight.log_size, sight.key_range
        return ops.row_scores(
            query,
            key,
            weight=torch.ones(B, R, device=query.device),
            log_size=None if log_size is None else log_size.expand(B, -1),
            key_range=None if key_range is None else key_range[:, :R].expand(B, -1, -1),
            scale=scale,
        )
    query, key = query.float(), key.float()
    total = query.new_zeros(*key.shape[:3])
    for first in range(0, R, _ROWS):
        logits = query[:, :, first : first + _ROWS] @ key.mT * scale
        total += sight.masked(logits, first).softmax(-1).sum(2)
    return total.mean(1)
