"""The naive model with cuts inside: no cache, every token from nothing, rows one by one.

From a report it takes which token went where. `attention` says what a cut should have gone by, from
the weights alone.
"""

from dataclasses import dataclass

import torch
from hf_harness import naive, reduced_row
from naive import Naive, Setting, Tokens
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """A cut of one row, without its padding."""

    layer: int
    members: list[list[int]]  # of every token left, those it stands for
    source: list[int]  # of every token left, the one whose position it has
    visual: list[bool]  # of the tokens before it

    def with_text(self, before: int, behind: int) -> "Cut":
        """With so many tokens around that stay."""
        total = before + len(self.visual) + behind
        head = [[i] for i in range(before)]
        tail = [[i] for i in range(before + len(self.visual), total)]
        inside = [[before + i for i in m] for m in self.members]
        source = [before + i for i in self.source]
        return Cut(
            self.layer,
            head + inside + tail,
            [m[0] for m in head] + source + [m[0] for m in tail],
            [False] * before + self.visual + [False] * behind,
        )


def cuts_of(handle, row: int) -> list[Cut]:
    cuts, before = [], handle.last.plan
    for stage in handle.last.stages:
        plan = stage.plan
        old = before.valid[row].nonzero().flatten().tolist()
        new = plan.valid[row].nonzero().flatten().tolist()
        place = {column: i for i, column in enumerate(old)}
        assign = [int(plan.assign[row, column]) for column in old]
        members = [[i for i, to in enumerate(assign) if to == column] for column in new]
        source = [place[int(plan.source[row, column])] for column in new]
        visual = [bool(before.is_visual[row, column]) for column in old]
        cuts.append(Cut(stage.layer, members, source, visual))
        before = plan
    return cuts


@dataclass(frozen=True)
class Inside:
    """The sequence as some layer has it."""

    x: Tensor  # [T, C]
    position: Tensor  # [G, T]
    size: Tensor  # [T]
    asks: Tensor  # [T] bool, as a query it gets the distance term, if anything is reduced
    reduced: bool

    def cut(self, cut: Cut, setting: Setting) -> "Inside":
        if len(cut.members) == len(self.x):
            return self
        weight = [self.size[m] / self.size[m].sum() for m in cut.members]
        x = torch.stack([w @ self.x[m] for w, m in zip(weight, cut.members, strict=True)])
        size = torch.stack([self.size[m].sum() for m in cut.members])
        position = self.position[:, cut.source]
        if setting.reindex:
            position = torch.arange(len(x))[None]
        return Inside(x, position, size, self.asks[cut.source], True)

    def bias(self, model: Naive, size: Tensor, setting: Setting) -> Tensor:
        """[T, T] what is added to the logits."""
        T = len(self.x)
        mass = size.log() if setting.size else torch.zeros(T, dtype=model.dtype)
        far = self.asks & self.reduced
        distance = torch.where(far[:, None], model.distance_bias(self.position), 0)
        return (mass + distance).masked_fill(
            torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")
        )


def walk(model: Naive, tokens: Tokens, asks: Tensor, cuts: list[Cut], setting: Setting):
    """(sequence, bias) of every layer, and the hidden states behind the last."""
    reduced = bool(tokens.distant.any())  # on the way in
    now = Inside(tokens.x, tokens.position, tokens.size, asks, reduced)
    layers = []
    for layer in range(model.config.num_hidden_layers):
        for cut in cuts:
            if cut.layer == layer:
                now = now.cut(cut, setting)
        size = tokens.uniform if layer == 0 and setting.uniform_first else now.size
        bias = now.bias(model, size, setting)
        layers.append((now, bias))
        x = model.layer(layer, now.x, now.position, bias)
        now = Inside(x, now.position, now.size, now.asks, now.reduced)
    return layers, now.x


def logits(
    model: Naive, prompt: Tokens, cuts: list[Cut], generated: list[int], setting: Setting
) -> Tensor:
    """[len(generated), V]: what predicts each of the generated tokens."""
    rows = []
    for t in range(len(generated)):
        answer = model.text(torch.tensor(generated[:t], dtype=torch.long), prompt.following)
        asks = torch.full((len(prompt) + t,), setting.distance)
        asks[len(prompt) :] &= setting.decode_distance
        there = [cut.with_text(0, t) for cut in cuts]
        x = walk(model, prompt.then(answer), asks, there, setting)[1]
        rows.append(said(model, x)[-1])
    return torch.stack(rows)


def said(model: Naive, x: Tensor) -> Tensor:
    return model.norm(x, "norm.weight") @ model.head.T


def attention(model: Naive, layer: int, x: Tensor, position: Tensor, bias: Tensor) -> Tensor:
    """[T, T] the attention of a layer on its input, averaged over heads."""
    prefix = f"layers.{layer}."
    h = model.norm(x, prefix + "input_layernorm.weight")
    D = model.config.hidden_size // model.config.num_attention_heads
    q, k = (
        model.linear(h, f"{prefix}self_attn.{name}_proj").unflatten(-1, (-1, D)).transpose(0, 1)
        for name in "qk"
    )
    q, k = model.rotate(q, position), model.rotate(k, position)
    shared = len(q) // len(k)
    heads = [(q[i] @ k[i // shared].T / D**0.5 + bias).softmax(-1) for i in range(len(q))]
    return torch.stack(heads).mean(0)


def expected(family: str, inputs: dict, handle, tokens: Tensor, row: int = 0, **setting) -> Tensor:
    """[new, V] the logits the naive model gives `tokens` ([new]) of one row."""
    how = Setting(**{"uniform_first": False, **setting})
    prompt = reduced_row(family, inputs, handle, row, how)
    copies = len(handle.last.plan.valid) // len(inputs["input_ids"])  # beams of a row
    cuts = cuts_of(handle, row * copies)
    return logits(naive(family), prompt, cuts, tokens.tolist(), how)


def setting_of(handle) -> dict[str, bool]:
    """What the handle was told, in the naive model's words."""
    settings = handle.settings
    return {
        "size": settings.sizes,
        "distance": settings.distance,
        "uniform_first": settings.layer0 == "uniform",
        "decode_distance": settings.decode_distance,
        "reindex": settings.positions == "reindex",
    }
