"""log(size) of the keys in attention that takes no bias: as one more channel of queries and keys.

    [q, 1] . [k, log(size) / scale] * scale = q . k * scale + log(size)

It is exact, at prefill and decode, in any kernel, and what is in the cache needs no more care
than other keys. A head grows to the next size that the kernel knows. In half precision what the
first channel rounds off goes into a second one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from restore_ext.integrations.vllm.rows import AXES, log_sizes

REACH = 4  # positions, in lengths of a prompt: what the rotary embedding has to have at hand
LARGEST_HEAD = 512


class FoldedRope(nn.Module):
    """A layer's rotary embedding, given rows in place of positions."""

    def __init__(self, stock: Any, stored: Any, folded: int, by_token: bool) -> None:
        """folded: channels that a head grows by; by_token: rows come as [L, ROWS]"""
        super().__init__()
        self.stock = stock
        self.axes = 0
        if isinstance(stock, MRotaryEmbedding):
            self.axes = AXES
            stock.mrope_section = stock.mrope_section[:AXES]  # the others are rows, not axes
        self.head_size, self.scale = stored.head_size, stored.impl.scale
        self.folded, self.by_token = folded, by_token

    def forward(self, rows: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [L, heads * D], turned; with more channels where they are folded."""
        if self.by_token:
            rows = rows.T
        positions = rows[: self.axes] if self.axes else rows[0].contiguous()
        query, key = self.stock(positions, query, key)
        if not self.folded:
            return query, key
        bias = log_sizes(rows)[:, None] / self.scale
        high = bias.to(key.dtype)
        channels = [high] if key.dtype == torch.float32 else [high, (bias - high).to(key.dtype)]
        of_key = torch.cat(channels, 1)  # [L, 1 or 2]
        return self._grow(query, torch.ones_like(of_key)), self._grow(key, of_key)

    def _grow(self, flat: Tensor, channels: Tensor) -> Tensor:
        size = self.head_size - self.folded
        heads = flat.view(len(flat), -1, size)
        channels = pad(channels, (0, self.folded - channels.shape[1]))
        more = channels[:, None].expand(-1, heads.shape[1], -1)
        return torch.cat([heads, more], -1).flatten(1)


class FoldedAttention(Attention):
    """A layer's attention and its cache, with larger heads."""

    def __init__(self, stock: Any, folded: int, config: VllmConfig) -> None:
        del config.compilation_config.static_forward_context[stock.layer_name]
        super().__init__(
            stock.num_heads,
            stock.head_size + folded,
            stock.impl.scale,
            num_kv_heads=stock.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=stock.quant_config,
            prefix=stock.layer_name,
        )
        self.folded = folded

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = value.view(len(value), self.num_kv_heads, -1)
        out = super().forward(query, key, pad(heads, (0, self.folded)).flatten(1))
        return out.view(len(out), self.num_heads, -1)[..., : -self.folded].flatten(1)


def fold(lm: Any, config: VllmConfig, *, sizes: bool, by_token: bool) -> None:
    """Has the decoder layers of a language model take rows in place of positions, and, with
    `sizes`, add log(size) to the logits.

    raises  NotImplementedError: attention of another kind than Llama's or Qwen2's
    """
    for layer in lm.layers:
        module = layer.self_attn
        stored = module.attn
        if type(stored) is not Attention or stored.sliding_window is not None:
            raise NotImplementedError(
                "model: every layer of the language model must have full attention, got "
                f"{type(stored).__name__} with sliding_window {stored.sliding_window}"
            )
        _reach(module.rotary_emb, config)
        folded = 0
        if sizes:
            dtype = config.model_config.dtype
            folded = _growth(stored, 1 if dtype == torch.float32 else 2)
            module.attn = stored = FoldedAttention(stored, folded, config)
        module.rotary_emb = FoldedRope(module.rotary_emb, stored, folded, by_token)


def reach(config: ModelConfig) -> int:
    """One more than the highest position that a prompt and its answer may come to."""
    return REACH * max(config.hf_text_config.max_position_embeddings, config.max_model_len)


def _reach(rope: Any, config: VllmConfig) -> None:
    """The rotary embedding is a table, for as many positions as a prompt has tokens."""
    wanted = reach(config.model_config)
    if len(rope.cos_sin_cache) >= wanted:
        return
    plain = type(rope) in (RotaryEmbedding, Llama3RotaryEmbedding)
    if not plain and not (type(rope) is MRotaryEmbedding and rope.scaling_factor is None):
        raise NotImplementedError(
            f"model: its RoPE must be the plain one, Llama 3's or M-RoPE, got {type(rope).__name__}"
        )
    rope.max_position_embeddings = wanted
    rope.cos_sin_cache = rope._compute_cos_sin_cache().to(rope.cos_sin_cache)


def _growth(stored: Any, channels: int) -> int:
    """How many channels a head grows by, to have so many more at a size that the kernel knows."""
    size = stored.head_size
    for grown in range(size + channels, LARGEST_HEAD + 1):
        if grown % 8 == 0 and stored.attn_backend.supports_head_size(grown):
            return grown - size
    raise NotImplementedError(
        f"model: {stored.attn_backend.get_name()} must have a head size above {size}, for "
        "log(size) goes into a channel of its own; use calibrate 'none', or another backend"
    )
