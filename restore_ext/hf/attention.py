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
from restore_ext.hf.parallel import Heads
from restore_ext.hf.scores import Asked
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


class _AsStock:
    """A module whose config is its own in every word."""

    def __init__(self, module: Any) -> None:
        self._module, self.config = module, module.config.stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def stock_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What `module` would have called, with the same arguments: the same bits."""
    name = module.config.stock._attn_implementation
    function = attention_named(name, module)
    # Flash attention looks its kernels up by the name in the config of the module it is given.
    return function(module if name in MASK_NEEDS else _AsStock(module), *args, **kwargs)


@dataclass
class Calibration:
    """One forward of the language model, as the attention of its layers sees it: T queries on K
    keys, both of which may differ from layer to layer.

    Rows in which nothing was ever reduced get no distance term: they stay what they are alone.
    """

    backend: str
    heads: Heads
    decays: Sequence[Tensor | None]  # per layer, [G, P] float32 where there is a distance term
    windows: Sequence[int | None]  # per layer
    window_cuts_blocks: bool
    near: int = 0  # the last so many queries get no distance term
    sides: dict[int, Side] = field(default_factory=dict)  # layer by layer, the T new keys included
    queries: dict[int, Tensor] = field(default_factory=dict)  # [B, G, T] int32, where they are
    blocks: dict[int, Blocks | None] = field(default_factory=dict)  # of the T new tokens
    asked: dict[int, Asked] = field(default_factory=dict)  # what is to be scored, in which layer
    scores: dict[int, Tensor] = field(default_factory=dict)  # [B, T] float32, what came of it
    descent: Any = None  # which goes through the layers with it
    seen: set[int] = field(default_factory=set)  # layers whose attention has run
    _keys: dict[int, Tensor] = field(default_factory=dict)
    _ranges: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def anew(self) -> "Calibration":
        """Of the same forward, with nothing known of any layer."""
        return Calibration(
            self.backend,
            self.heads,
            self.decays,
            self.windows,
            self.window_cuts_blocks,
            self.near,
        )

    def parts(self, layer: int) -> list[tuple[int, int, dict[str, Any]]]:
        """Which queries see which keys how: (query count, key count, arguments of attention)."""
        T, K = self.queries[layer].shape[-1], self.sides[layer].log_size.shape[-1]
        far = T - self.near
        parts = [(far, K - self.near, self.arguments(layer, 0, far, K - self.near))]
        if self.near:
            parts.append((self.near, K, self.arguments(layer, far, T, K)))
        return parts

    def arguments(self, layer: int, first: int, past: int, K: int) -> dict[str, Any]:
        """What attention is told of queries first..past - 1 of a layer and its first K keys."""
        side, queries, decay = self.sides[layer], self.queries[layer], self.decays[layer]
        arguments = {"log_size": side.log_size[:, :K], **self._visible(layer, first, past)}
        if decay is None or first >= queries.shape[-1] - self.near:
            return arguments
        if id(side.position) not in self._keys:
            self._keys[id(side.position)] = only_rows(side.reduced, side.position)
        return {
            **arguments,
            "query_position": only_rows(side.reduced, queries)[..., first:past],
            "key_position": self._keys[id(side.position)][..., :K],
            "decay": decay,
        }

    def _visible(self, layer: int, first: int, past: int) -> dict[str, Any]:
        """The arguments of attention for queries first..past - 1 that bound what they see."""
        side, window = self.sides[layer], self.windows[layer]
        key = (id(side.log_size), window)
        if key not in self._ranges:
            self._ranges[key] = key_range(
                side,
                self.queries[layer],
                window=window,
                blocks=self.blocks[layer],
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

    def score(self, layer: int, query: Tensor, key: Tensor, kwargs: Any) -> None:
        """Has the tokens of this forward rated by those who are asked, as this layer sees them."""
        asked = self.asked[layer]
        past, K = query.shape[2] - asked.draft, key.shape[2] - asked.draft
        first = past - asked.rows
        arguments = self.arguments(layer, first, past, K)
        scores = asked.scores(
            query[:, :, first:past], key[:, :, :K], arguments, kwargs, self.backend
        )
        scores = self.heads.mean(scores, query.shape[1])
        self.scores[layer] = pad(scores[:, K - past :], (0, asked.draft))

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


@dataclass
class Glance:
    """A look at what a layer's attention would get; nothing is attended to."""

    query: Tensor | None = None  # [B, Hq, T, D], rotated
    key: Tensor | None = None  # [B, Hkv, T, D]
    kwargs: dict[str, Any] = field(default_factory=dict)


def calibrated(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention: calibrated where a Calibration came along, stock elsewhere."""
    state: Calibration | Glance | None = kwargs.pop(STATE, None)
    if state is None:
        return stock_attention(module, query, key, value, attention_mask, **kwargs)
    if isinstance(state, Glance):
        state.query, state.key, state.kwargs = query, key, kwargs
        return torch.zeros_like(query.transpose(1, 2)), None
    layer: int = module.layer_idx
    state.seen.add(layer)
    if layer in state.asked:
        state.score(layer, query, key, kwargs)
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
