"""What a hooked model must say, the slow way: no cache, no hooks, no mask or attention functions.

From a report it takes only the plan (which token went where); from the model only weights and image
features (give it a model that was never attached). Everything else is recomputed for each new
token: the merged embeddings, the positions, the bias, every layer. In float64 it is the truth.
"""

import inspect
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from restore_ext.testing.models import IMAGE, MROPE_SECTION

# Column c of a plan is what became of one token of the row, padding included.


@dataclass(frozen=True)
class Setting:
    """What attach() was told, in the words of the method."""

    size: bool = True
    distance: bool = True
    uniform_first: bool = True  # layer 0 sees N / n for every visual token
    decode_distance: bool = False
    reindex: bool = False


@dataclass(frozen=True)
class Tokens:
    """A stretch of the sequence the language model sees."""

    x: Tensor  # [T, C] embeddings
    position: Tensor  # [G, T], G = 1 or the three axes of M-RoPE
    size: Tensor  # [T]
    uniform: Tensor  # [T] the size in layer 0
    distant: Tensor  # [T] bool, as a query it gets the distance bias
    following: int  # the position that comes next

    def __len__(self) -> int:
        return len(self.x)

    def then(self, later: "Tokens") -> "Tokens":
        joined = {
            name: torch.cat([getattr(self, name), getattr(later, name)], -1)
            for name in ("position", "size", "uniform", "distant")
        }
        x = torch.cat([self.x, later.x])
        return Tokens(x, **joined, following=later.following)


class Naive:
    """A model with a LLaMA, Mistral or Qwen2 inside as a few functions of its weights."""

    def __init__(self, model, dtype: torch.dtype = torch.float64):
        self.model, self.dtype = model, dtype
        inner = model.model
        language = inner.text_model if hasattr(inner, "text_model") else inner.language_model
        self.config = language.config
        self.inv_freq = language.rotary_emb.inv_freq.to(dtype)
        self.weights = {n: w.detach().to(dtype) for n, w in language.named_parameters()}
        self.head = model.lm_head.weight.detach().to(dtype)

    def prompt(self, inputs: dict, features: list[Tensor] | None = None, start: int = 0) -> Tokens:
        """One unpadded row as stock sees it; positions from `start`. features: image by image."""
        ids = inputs["input_ids"][0]
        if features is None:
            features = image_features(self.model, inputs)
        x = self.embed(ids)
        if features:
            rows = torch.cat([f.to(self.dtype) for f in features])
            x = x.masked_scatter((ids == IMAGE)[:, None], rows)
        if "image_grid_thw" in inputs or "mm_token_type_ids" in inputs or self.axes() == 3:
            position = mrope_positions(ids, inputs.get("image_grid_thw", []), start)
        else:
            position = start + torch.arange(len(ids))[None]
        return self.plain(x, position)

    def text(self, ids: Tensor, following: int) -> Tokens:
        """Text tokens from position `following` on, on every axis."""
        position = (following + torch.arange(len(ids))).expand(self.axes(), -1)
        return self.plain(self.embed(ids), position, following)

    def plain(self, x: Tensor, position: Tensor, following: int = 0) -> Tokens:
        one = torch.ones(len(x), dtype=self.dtype)
        past = int(position.max()) + 1 if len(x) else following
        return Tokens(x, position, one, one, torch.zeros(len(x), dtype=torch.bool), past)

    def reduced(self, full: Tokens, plan, row: int, setting: Setting) -> Tokens:
        """The row after the plan: plain means over assigned sources, positions of the source."""
        padding = plan.assign.shape[1] - len(full)
        assign = plan.assign[row, padding:]
        columns = plan.valid[row].nonzero().flatten().tolist()
        if len(columns) == len(full):  # nothing was reduced in this row: it is stock
            return full
        members = [(assign == column).nonzero().flatten() for column in columns]
        position = full.position[:, plan.source[row, columns] - padding]
        following = full.following
        if setting.reindex:
            position, following = torch.arange(len(columns))[None], len(columns)
        return Tokens(
            torch.stack([full.x[m].mean(0) for m in members]),
            position,
            torch.tensor([float(len(m)) for m in members], dtype=self.dtype),
            plan.uniform[row, columns].to(self.dtype),
            torch.full((len(columns),), setting.distance),
            following,
        )

    def logits(self, prompt: Tokens, generated: list[int], setting: Setting) -> Tensor:
        """[len(generated), V]: what predicts each of the generated tokens, each from nothing."""
        rows = []
        for t in range(len(generated)):
            answer = self.text(torch.tensor(generated[:t], dtype=torch.long), prompt.following)
            far = setting.distance and setting.decode_distance and not self.stock(prompt)
            answer = replace(answer, distant=torch.full((t,), far))
            rows.append(self.forward(prompt.then(answer), setting)[-1])
        return torch.stack(rows)

    def forward(self, tokens: Tokens, setting: Setting) -> Tensor:
        """[T, V]"""
        T, x = len(tokens), tokens.x
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        distance = torch.where(tokens.distant[:, None], self.distance_bias(tokens.position), 0)
        for layer in range(self.config.num_hidden_layers):
            first = layer == 0 and setting.uniform_first
            size = tokens.uniform if first else tokens.size
            mass = size.log() if setting.size else 0
            bias = (mass + distance).masked_fill(later, float("-inf"))
            x = self.layer(layer, x, tokens.position, bias)
        return self.norm(x, "norm.weight") @ self.head.T

    def layer(self, number: int, x: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        prefix = f"layers.{number}."
        h = self.norm(x, prefix + "input_layernorm.weight")
        D = self.config.hidden_size // self.config.num_attention_heads
        q, k, v = (
            self.linear(h, f"{prefix}self_attn.{name}_proj").unflatten(-1, (-1, D)).transpose(0, 1)
            for name in "qkv"
        )
        q, k = self.rotate(q, position), self.rotate(k, position)
        shared = len(q) // len(k)
        mixed = []
        for head in range(len(q)):
            logit = q[head] @ k[head // shared].T / D**0.5 + bias
            mixed.append(logit.softmax(-1) @ v[head // shared])
        x = x + self.linear(torch.cat(mixed, -1), f"{prefix}self_attn.o_proj")
        h = self.norm(x, prefix + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self.linear(h, prefix + "mlp.gate_proj"))
        h = gate * self.linear(h, prefix + "mlp.up_proj")
        return x + self.linear(h, prefix + "mlp.down_proj")

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """RoPE: frequency i turns the pair (i, i + D/2) by the position on its own axis."""
        angle = position[self.axis_of_frequency()].T.to(self.dtype) * self.inv_freq
        cos, sin = angle.cos(), angle.sin()  # [T, D/2]
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def distance_bias(self, position: Tensor) -> Tensor:
        """[T, T] log(2 - mean over frequencies of cos(distance * frequency)), term by term."""
        total = 0
        axes = self.axis_of_frequency()
        for axis, frequency in zip(axes.tolist(), self.inv_freq, strict=True):
            p = position[axis].to(self.dtype)
            total = total + ((p[:, None] - p[None, :]) * frequency).cos()
        return (2 - total / len(axes)).log()

    def axis_of_frequency(self) -> Tensor:
        if self.axes() == 1:
            return torch.zeros(len(self.inv_freq), dtype=torch.long)
        return torch.arange(3).repeat_interleave(torch.tensor(MROPE_SECTION))

    def axes(self) -> int:
        return 3 if "qwen2_5_vl" in self.config.model_type else 1

    def stock(self, prompt: Tokens) -> bool:
        return not bool(prompt.distant.any())

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["embed_tokens.weight"][ids]

    def norm(self, x: Tensor, name: str) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * (variance + self.config.rms_norm_eps).rsqrt() * self.weights[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(name + ".bias")
        y = x @ self.weights[name + ".weight"].T
        return y if bias is None else y + bias


def mrope_positions(ids: Tensor, grids, start: int = 0) -> Tensor:
    """[3, S] of Qwen2-VL: text counts on all axes; an image counts time, row and column, from the
    next free position, and takes as many positions as its longer side has tokens."""
    position, at, column = [], start, 0
    grids = [tuple(map(int, grid)) for grid in grids]
    while column < len(ids):
        if ids[column] != IMAGE or not grids:
            position.append((at, at, at))
            at, column = at + 1, column + 1
            continue
        frames, height, width = grids.pop(0)
        assert frames == 1
        height, width = height // 2, width // 2
        position += [(at, at + y, at + x) for y in range(height) for x in range(width)]
        at, column = at + max(height, width), column + height * width
    return torch.tensor(position).T


def window_order(grids, side: int = 2) -> Tensor:
    """The order Qwen2.5-VL's vision tower works in: image by image, windows of side x side."""
    order, first = [], 0
    for _, height, width in (tuple(map(int, grid)) for grid in grids):
        height, width = height // 2, width // 2
        order += [
            first + y * width + x
            for top in range(0, height, side)
            for left in range(0, width, side)
            for y in range(top, min(top + side, height))
            for x in range(left, min(left + side, width))
        ]
        first += height * width
    return torch.tensor(order)


@torch.no_grad()
def image_features(model, inputs: dict) -> list[Tensor]:
    """[N, C] per image, or per row where the model has them so, on every transformers."""
    if "pixel_values" not in inputs:
        return []
    encode = model.model.get_image_features
    sizes = ("image_sizes",) if "image_sizes" in inputs else ()
    names = {*inspect.signature(encode).parameters, *sizes}
    out = encode(**{name: inputs[name] for name in names if name in inputs})
    return [f.reshape(-1, f.shape[-1]) for f in getattr(out, "pooler_output", out)]
