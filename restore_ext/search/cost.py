"""What a schedule costs, by formula."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from restore_ext import checks
from restore_ext.hf.families.family import head_size, kv_heads
from restore_ext.stages.select import share_of

Counts = tuple[int, ...]  # tokens each layer keeps of the largest image


@dataclass(frozen=True)
class Shape:
    """A row of a prompt: the visual tokens of each of its images, and its other tokens."""

    images: tuple[int, ...]
    text: int

    def visual(self, layers: Sequence[float]) -> list[int]:
        """The visual tokens of every layer, under these shares."""
        return [sum(share_of(n, share) for n in self.images) for share in layers]


def flops(config: Any, visual: Sequence[int], text: int = 0) -> int:
    """Multiply-adds of the decoder layers for one prompt, the count that papers call FLOPs.

    A layer that has N tokens takes 4 N C^2 + 2 N^2 C + 3 N C F for width C and MLP width F: the
    projections, queries by keys and weights by values of all pairs, and a gated MLP. Keys and
    values of fewer heads than queries, and heads of another total width than C, count as they are.
    Twice this is what torch.utils.flop_counter says. Embeddings, vision tower, head, norms and the
    search for the tokens that stay are not in it; nor is it less for causal or sliding masks.

    config  of a transformers model; its text config counts
    visual  the visual tokens of every layer
    text    the other tokens of the prompt

    raises  TypeError, ValueError: not one whole number >= 0 a layer
    """
    config = config.get_text_config()
    width, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_size(config)
    keys = kv_heads(config) * head_size(config)
    per_token = width * (2 * queries + 2 * keys + 3 * mlp)
    return sum(n * per_token + 2 * n * n * queries for n in _tokens(config, visual, text))


def kv_bytes(
    config: Any, visual: Sequence[int], text: int = 0, *, dtype: torch.dtype = torch.float16
) -> int:
    """Bytes of keys and values of all layers behind one prompt: 2 N H D numbers of `dtype` a layer,
    of H key heads of size D. More than there is where a cache forgets what a window has left.

    config, visual, text, raises  as for flops()
    """
    config = config.get_text_config()
    per_token = 2 * kv_heads(config) * head_size(config) * dtype.itemsize
    return sum(_tokens(config, visual, text)) * per_token


def _tokens(config: Any, visual: Sequence[int], text: int) -> list[int]:
    layers = config.num_hidden_layers
    if isinstance(visual, str) or not isinstance(visual, Sequence) or len(visual) != layers:
        raise ValueError(f"visual must be {layers} ints, one a layer of the model, got {visual!r}")
    for name, count in [("text", text), *((f"visual[{i}]", n) for i, n in enumerate(visual))]:
        if checks.require_int(name, count) < 0:
            raise ValueError(f"{name} must be an int >= 0, got {count}")
    return [n + text for n in visual]


def mean_over(
    shapes: Iterable[Shape], cost: Callable[[Sequence[int], int], int]
) -> Callable[[Sequence[float]], float]:
    """A function of shares: the mean of cost(visual tokens of every layer, text) over the rows."""
    rows = Counter(shapes)

    def mean(layers: Sequence[float]) -> float:
        total = sum(times * cost(row.visual(layers), row.text) for row, times in rows.items())
        return total / rows.total()

    return mean
