"""Calibrated attention for a prompt that was shortened beforehand, on whatever cache there is.

The sizes of a prompt are known before generate() starts and those of generated tokens are 1, so all
that attention needs is one table: nothing is stored in the cache, nothing depends on values that
only the device knows, and a decoding step compiles to one graph.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from restore_ext import reference
from restore_ext.hf.attention import (
    PREPARED,
    attend_by_op,
    finite,
    only_rows,
    stock_attention,
)
from restore_ext.hf.cache import Side


@dataclass
class Prompt:
    """B prompts of n keys; a batch of beams has B * k rows, those of a prompt together."""

    backend: str
    first: Side  # of layer 0
    others: Side
    decay: Tensor | None  # [G, P] float32, for the prompt's own queries
    later_decay: Tensor | None  # the same for generated tokens
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def rows(self, layer: int, R: int) -> tuple[Tensor, Tensor]:
        """log_size [R, n] and position [R, G, n] of a layer."""
        side = self.others if layer else self.first
        log_size, position = side.log_size, only_rows(side.reduced, side.position)
        copies = R // len(log_size)
        if copies > 1:
            log_size = log_size.repeat_interleave(copies, 0)
            position = position.repeat_interleave(copies, 0)
        return log_size, position

    def at_start(self, layer: int, R: int) -> dict[str, Any]:
        """What calibrated attention takes for the prompt itself."""
        log_size, position = self.rows(layer, R)
        if self.decay is None:
            return {"log_size": log_size}
        return {
            "log_size": log_size,
            "query_position": position,
            "key_position": position,
            "decay": self.decay,
        }

    def mask_at_start(self, layer: int, R: int, dtype: torch.dtype) -> Tensor:
        key = (layer == 0, R, dtype)
        if key not in self._masks:
            arguments = self.at_start(layer, R)
            n, device = arguments["log_size"].shape[1], arguments["log_size"].device
            self._masks[key] = finite(
                reference.attention_bias(R, n, n, device=device, **arguments), dtype
            )
        return self._masks[key]

    def later(self, layer: int, R: int, T: int, K: int, visible: Tensor | None) -> dict[str, Any]:
        """What it takes for T queries on K keys, the prompt's first.

        visible  [R or 1, T, K] bool; None where every query sees all keys up to its own
        """
        log_size, position = self.rows(layer, R)
        n = log_size.shape[1]
        log_size = pad(log_size, (0, K - n))
        if visible is not None:
            log_size = log_size.masked_fill(~visible[:, -1], float("-inf"))
        if self.later_decay is None:
            return {"log_size": log_size}
        index = torch.arange(K, dtype=torch.int32, device=log_size.device)
        following = position[..., -1:] + 1 + index[: K - n]
        keys = only_rows(
            self._reduced_rows(R), torch.cat([position, following.to(position.dtype)], -1)
        )
        if visible is None:
            at = index[K - T :].expand(R, T)
        else:  # a query's own key is the last it sees
            at = torch.where(visible, index, 0).amax(-1).expand(R, T)
        at = at[:, None].expand(-1, keys.shape[1], -1).long()
        return {
            "log_size": log_size,
            "query_position": keys.gather(-1, at),
            "key_position": keys,
            "decay": self.later_decay,
        }

    def _reduced_rows(self, R: int) -> Tensor:
        reduced = self.others.reduced
        return reduced.repeat_interleave(R // len(reduced), 0)


def prepared(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention of a model in a `with` block of prepare_inputs()."""
    prompt: Prompt = module.config.state
    layer: int = module.layer_idx
    (R, _, T, _), K = query.shape, key.shape[2]
    n = prompt.others.log_size.shape[1]
    kwargs.pop("position_ids", None)
    visible = None if attention_mask is None else _visible(attention_mask, K)
    start = T > 1 and _is_start(visible, T, K)
    _require_prompt(prompt, R, T if start else n, K)
    if start:
        key, value = key[:, :, :n], value[:, :, :n]  # of a static cache the rest is empty
    if prompt.backend == "op":
        arguments = prompt.at_start(layer, R) if start else prompt.later(layer, R, T, K, visible)
        return attend_by_op(query, key, value, arguments, kwargs), None
    if start:
        mask = prompt.mask_at_start(layer, R, query.dtype)
    else:
        arguments = prompt.later(layer, R, T, K, visible)
        bias = reference.attention_bias(R, T, K, device=query.device, **arguments)
        mask = finite(bias, query.dtype)
    return stock_attention(module, query, key, value, mask, **kwargs)


def _visible(mask: Tensor, K: int) -> Tensor:
    """[R or 1, T, K] bool from a mask of stock: bool, or what is added to the logits."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[:, 0, :, :K]


def _is_start(visible: Tensor | None, T: int, K: int) -> bool:
    """Whether T > 1 queries are a prompt on an empty cache, not tokens to verify.

    On a growing cache a prompt has as many keys; on a static one its last token does not see the
    last key. Only there a mask may be left out that is not about all keys.
    """
    return K == T or visible is None or not bool(visible[:, -1, -1].any())


def _require_prompt(prompt: Prompt, R: int, T: int, K: int) -> None:
    B, n = prompt.others.log_size.shape
    if n != T or n > K or R % B:
        raise RuntimeError(
            f"inside `with prepared:` the model must be given these prompts, of {n} tokens in {B} "
            f"rows, by generate(**prepared) with a cache; got {T} tokens in {R} rows on {K} keys"
        )


AttentionInterface.register(PREPARED, prepared)
