"""Attention functions that transformers calls by name, chosen for one module without a trace.

transformers looks its attention function up by `module.config._attn_implementation`. The config
itself is shared, saved and copied, so it stays as it is: a hooked attention module gets, as its own
`config`, a NamedConfig that differs in this one word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from restore_ext import ops, reference
from restore_ext.hf.cache import Side
from restore_ext.hf.compat import attention_named
from restore_ext.hf.visible import Blocks, key_range

CALIBRATED = "restore_ext"
PREPARED = "restore_ext_prepared"
STATE = "restore_ext"  # the keyword by which a Calibration reaches each layer's attention
MASK_NEEDS = ("sdpa", "eager")  # the stock attentions that add a [B, 1, T, K] mask


class NamedConfig:
    """A module's config in everything but the attention it names."""

    def __init__(self, stock: Any, name: str, state: Any = None) -> None:
        self.stock: Any = stock.stock if isinstance(stock, NamedConfig) else stock
        self.state = state
        self._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("stock"), name)


def stock_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What `module` would have called, with the same arguments: the same bits."""
    function = attention_named(module.config.stock._attn_implementation, module)
    return function(module, *args, **kwargs)


@dataclass
class Calibration:
    """One forward of the language model on T queries and K keys, as its attention sees it.

    Rows in which nothing was ever reduced get no distance term: they stay what they are alone.
    """

    backend: str
    sides: list[Side]  # per layer, the T new keys included
    query_position: Tensor  # [B, G, T] int32
    far: int  # the first so many queries get the distance term
    decays: Sequence[Tensor | None]  # per layer, [G, P] float32 where there is one
    windows: Sequence[int | None]  # per layer
    blocks: Blocks | None  # of the T new tokens
    window_cuts_blocks: bool
    seen: set[int] = field(default_factory=set)  # layers whose attention has run
    _keys: dict[int, Tensor] = field(default_factory=dict)
    _ranges: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def parts(self, layer: int) -> list[tuple[int, int, dict[str, Any]]]:
        """Which queries see which keys how: (query count, key count, arguments of attention)."""
        side, T, decay = self.sides[layer], self.query_position.shape[-1], self.decays[layer]
        K = side.log_size.shape[-1]
        if decay is None or not self.far:
            return [(T, K, {"log_size": side.log_size, **self._visible(layer, 0, T)})]
        near = T - self.far
        if id(side.position) not in self._keys:
            self._keys[id(side.position)] = only_rows(side.reduced, side.position)
        distant = {
            "log_size": side.log_size[:, : K - near],
            "query_position": only_rows(side.reduced, self.query_position)[..., : self.far],
            "key_position": self._keys[id(side.position)][..., : K - near],
            "decay": decay,
            **self._visible(layer, 0, self.far),
        }
        rest = {"log_size": side.log_size, **self._visible(layer, self.far, T)}
        return [(self.far, K - near, distant), *([(near, K, rest)] if near else [])]

    def _visible(self, layer: int, first: int, past: int) -> dict[str, Any]:
        """The arguments of attention for the queries from `first` on that bound what they see."""
        side, window = self.sides[layer], self.windows[layer]
        key = (id(side.log_size), window)
        if key not in self._ranges:
            self._ranges[key] = key_range(
                side,
                self.query_position,
                window=window,
                blocks=self.blocks,
                window_cuts_blocks=self.window_cuts_blocks,
            )
        ranges = self._ranges[key]
        return {} if ranges is None else {"causal": False, "key_range": ranges[:, first:past]}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kwargs: Any) -> Tensor:
        """By the op, [B, T, H, D]."""
        outs, first = [], 0
        for T, K, arguments in self.parts(layer):
            some = query[:, :, first : first + T], key[:, :, :K], value[:, :, :K]
            outs.append(attend_by_op(*some, arguments, kwargs))
            first += T
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def mask(self, layer: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, T, K], what is added to the logits; layers that share a log_size share it."""
        log_size = self.sides[layer].log_size
        B, K = log_size.shape
        key = (id(log_size), id(self.decays[layer]), self.windows[layer], dtype)
        if key not in self._masks:
            biases = []
            for T, k, arguments in self.parts(layer):
                bias = reference.attention_bias(B, T, k, device=log_size.device, **arguments)
                biases.append(pad(bias, (0, K - k), value=float("-inf")))
            self._masks[key] = finite(torch.cat(biases, 2), dtype)
        return self._masks[key]


def calibrated(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention: calibrated where a Calibration came along, stock elsewhere."""
    state: Calibration | None = kwargs.pop(STATE, None)
    if state is None:
        return stock_attention(module, query, key, value, attention_mask, **kwargs)
    layer: int = module.layer_idx
    state.seen.add(layer)
    if state.backend == "op":
        return state.attend(layer, query, key, value, kwargs), None
    require_mask_attention(module.config.stock._attn_implementation)
    mask = state.mask(layer, query.dtype).to(query.device)
    # The positions have gaps: some attentions would take them for several packed sequences.
    kwargs.pop("position_ids", None)
    return stock_attention(module, query, key, value, mask, **kwargs)


def attend_by_op(
    query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any], kwargs: dict[str, Any]
) -> Tensor:
    """`calibrated_attention` as transformers wants it, [B, T, H, D]; kwargs of the attention call.

    Layers may be on several devices, the arguments are on the first."""
    here: dict[str, Any] = {
        name: value.to(query.device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    softcap, scale = kwargs.get("softcap") or 0.0, kwargs.get("scaling")
    out = ops.calibrated_attention(query, key, value, softcap=softcap, scale=scale, **here)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def only_rows(rows: Tensor, position: Tensor) -> Tensor:
    """Positions [B, G, L] in `rows` [B]; zeros, so no distance to anything, in the others."""
    return torch.where(rows[:, None, None], position, 0)


def finite(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in the model's dtype, its lowest number for -inf: a row of padding sees no key, and a
    softmax over -inf alone would be NaN."""
    return bias.to(dtype).clamp(min=torch.finfo(dtype).min)


def require_mask_attention(name: str) -> None:
    if name not in MASK_NEEDS:
        raise ValueError(
            f"backend='mask' needs the attention implementation {' or '.join(MASK_NEEDS)}, got "
            f"{name!r}; set_attn_implementation('sdpa') or use backend='op'"
        )


AttentionInterface.register(CALIBRATED, calibrated)
