"""A cache layer that says how long the conversation is and stores how little is left of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

INSTEAD = "use restore_ext.prepare_inputs(...) instead of attach"


@dataclass(frozen=True)
class Side:
    """What attention must know of the cached keys of one layer, beside the keys. Never changed."""

    log_size: Tensor  # [B, K] float32; -inf is padding
    position: Tensor  # [B, G, K] int32, what the keys were rotated by
    shift: Tensor  # [B] int64, tokens reduced away so far: re-indexed positions lag by it
    reduced: Tensor  # [B] bool, something was reduced in this row
    _next: list[tuple[str, Any, "Side"]] = field(default_factory=list, repr=False, compare=False)

    def then(self, tail: "Side") -> "Side":
        """With the keys of `tail` behind."""

        def join() -> Side:
            return Side(
                torch.cat([self.log_size, tail.log_size], -1),
                torch.cat([self.position, tail.position], -1),
                self.shift + tail.shift,
                self.reduced | tail.reduced,
            )

        return self._once("then", tail, join)

    def rows(self, key: Any, change: Callable[[Tensor], Tensor]) -> "Side":
        """With `change` done to every tensor's rows; the same `key` means the same change."""

        def select() -> Side:
            return Side(
                change(self.log_size),
                change(self.position),
                change(self.shift),
                change(self.reduced),
            )

        return self._once("rows", key, select)

    def without_last(self, count: int) -> "Side":
        def cut() -> Side:
            kept = self.log_size.shape[-1] - count
            return Side(
                self.log_size[..., :kept], self.position[..., :kept], self.shift, self.reduced
            )

        return self._once("cut", count, cut)

    def _once(self, kind: str, key: Any, make: Callable[[], "Side"]) -> "Side":
        """Layers share one Side, and a cache does to each layer in turn what it does to the first:
        the latest result is kept, so that all but the first layer find it done, and still share."""
        for known_kind, known, result in self._next:
            if known_kind == kind and known is key:
                return result
        result = make()
        self._next[:] = [(kind, key, result)]
        return result


class RestoreLayer(DynamicLayer):
    """Keys and values of a reduced sequence.

    `get_seq_length` is the logical length, that of the sequence before the reduction: generate()
    slices the prompt, continues positions and counts by it. `get_mask_sizes` is the physical one.
    """

    keys: Any  # a tensor once there is a first key
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side: Side | None = None
        self.logical = 0
        self.reach = 0  # one more than the highest position
        self.croppable = 0  # tokens at the end with nothing reduced among them

    def extend(self, tail: Side, *, logical: int, reach: int, croppable: int | None) -> None:
        """Announces the keys that the next `update` brings: tail [B, K], of `logical` tokens.

        croppable  of these tokens, if not all, and none before them
        """
        self.side = tail if self.side is None else self.side.then(tail)
        self.logical += logical
        self.reach = max(self.reach, reach)
        self.croppable = self.croppable + logical if croppable is None else croppable

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.side is None or self.side.log_size.shape[-1] != keys.shape[-2]:
            raise RuntimeError(
                "past_key_values holds a reduced sequence: continue it with the model that "
                "reduced it, still attached"
            )
        return keys, values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.logical

    def get_mask_sizes(self, query: int | Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # 4.57 hands over cache_position, later versions a number.
        length = query.shape[0] if isinstance(query, Tensor) else query
        return self.physical + length, 0

    @property
    def physical(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def reset(self) -> None:
        # Dropped, not zeroed as 4.57 does: what is left would still count as keys.
        self.keys = self.values = None
        self.is_initialized = False
        self.side, self.logical, self.reach, self.croppable = None, 0, 0, 0

    def crop(self, tokens: int) -> None:
        """Drops `-tokens` tokens at the end; a positive number is the length to keep (4.57)."""
        drop = -tokens if tokens <= 0 else max(self.logical - tokens, 0)
        if drop == 0 or self.side is None:
            return
        if drop >= self.logical:
            return self.reset()
        if drop > self.croppable:
            raise ValueError(
                f"crop: only the last {self.croppable} tokens can be dropped, those before were "
                f"reduced together; got {drop} of {self.logical}"
            )
        self.keys, self.values = self.keys[..., :-drop, :], self.values[..., :-drop, :]
        self.side = self.side.without_last(drop)
        self.logical -= drop
        self.croppable -= drop

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx, lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(repeats, lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices, lambda x: x[indices.to(x.device)])

    def _rows(self, key: Any, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized and self.side is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            self.side = self.side.rows(key, change)


def restored(cache: Any) -> list[RestoreLayer]:
    """The layers of a cache that holds a reduced sequence; none for every other cache."""
    layers = cache.layers if isinstance(cache, Cache) else []
    return list(layers) if layers and isinstance(layers[0], RestoreLayer) else []


def refuse_cache(cache: Any) -> None:
    """Raises where a cache cannot carry a Side: all that is not a plain DynamicCache."""
    if cache is None or restored(cache):
        return
    if not isinstance(cache, Cache):
        raise NotImplementedError(
            f"past_key_values must be a transformers Cache, got {type(cache).__name__}; {INSTEAD}"
        )
    if getattr(cache, "offloading", False):
        raise NotImplementedError(
            f"past_key_values: an offloaded cache cannot hold a reduced sequence; {INSTEAD}"
        )
    if any(_has_dropped(layer) for layer in cache.layers):
        raise NotImplementedError(
            "past_key_values: a sliding window has dropped keys already, which a reduced sequence "
            "must still know of; reduce the images of an earlier turn, or start a new conversation"
        )
    kinds = {type(layer) for layer in cache.layers}
    if not kinds and getattr(cache, "layer_class_to_replicate", None) is not None:
        kinds = {cache.layer_class_to_replicate}
    for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer, RestoreLayer}:
        name = type(cache).__name__
        raise NotImplementedError(
            f"past_key_values: a reduced sequence needs a DynamicCache, got {name} of "
            f"{kind.__name__} (static, quantised and offloaded caches cannot); {INSTEAD}"
        )


def _has_dropped(layer: Any) -> bool:
    kept = layer.keys.shape[-2] if layer.is_initialized and layer.keys.numel() else 0
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() > kept


def restore_cache(cache: Any, layers: int, side: Callable[[int], Side], config: Any) -> Any:
    """Makes the layers of a cache RestoreLayers, in place: the object generate() holds stays.

    side  what to say of n keys that are there already, called if there are any
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if restored(cache):
        return cache
    known = [layer for layer in cache.layers if layer.is_initialized and layer.keys.numel()]
    old = side(known[0].keys.shape[-2]) if known else None
    fresh = [RestoreLayer() for _ in range(layers)]
    for layer, before in zip(fresh, known, strict=False):
        layer.dtype, layer.device, layer.is_initialized = before.dtype, before.device, True
        layer.keys, layer.values, layer.side = before.keys, before.values, old
        layer.logical = layer.croppable = layer.reach = before.keys.shape[-2]
    cache.layers = fresh
    if hasattr(cache, "layer_class_to_replicate"):
        cache.layer_class_to_replicate = None
    return cache
