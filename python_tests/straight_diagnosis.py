"""What a diagnosis must find of one prompt, straight from the model's own layers in float64.

The reduced runs are dense.py's, whose layers get every position, size and distance as one dense
bias, and return their attention weights; the full run is the model's, eager, as it is. From a
report it takes which token went where.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from dense import Dense, Prompt
from naive import Setting
from naive_stages import cuts_of, setting_of
from torch import Tensor

from restore_ext.testing.models import IMAGE

KINDS = ("visual", "text", "last")


@dataclass
class Straight:
    share: dict[str, list[float]]  # per layer
    received: dict[str, list[Tensor]]  # per layer [S]: what each token of the prompt gets
    states: list[Tensor]  # [C] of each token left
    members: list[list[int]]  # of each token left, which of the prompt's it is
    visual: list[bool]
    logits: Tensor  # [n, V]


def visual_of(plan, row: int, S: int) -> list[bool]:
    """Which of the S tokens of a row, without padding, are visual: dropped, or in a visual one."""
    assign = plan.assign[row, plan.assign.shape[1] - S :].tolist()
    return [to < 0 or bool(plan.is_visual[row, to]) for to in assign]


@torch.no_grad()
def full_run(
    dense: Dense, prompt: Prompt, inputs: dict, visual: list[bool], answer: list[int]
) -> Straight:
    """A row by itself, unhooked: what stock says of its attention, and dense.py of the words."""
    S = len(visual)
    doubles = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    with caught(dense) as (_, states):
        out = dense.model(**doubles, use_cache=False, output_attentions=True)
    all_of_it = torch.arange(S)[None]
    plan = SimpleNamespace(
        assign=all_of_it, source=all_of_it, valid=all_of_it >= 0, uniform=torch.ones(1, S)
    )
    logits = dense.logits(prompt, plan, 0, answer, Setting(False, False))
    assert logits[0].allclose(out.logits[0, -1])
    layers = [(w[0].mean(0), [[i] for i in range(S)], visual) for w in out.attentions]
    return _straight(layers, inputs["input_ids"][0].tolist(), list(states[0]), logits)


@torch.no_grad()
def reduced_run(
    dense: Dense, prompt: Prompt, inputs: dict, handle, row: int, answer: list[int]
) -> Straight:
    plan, cuts = handle.last.plan, cuts_of(handle, row)
    S = len(prompt.embeds)
    assign = plan.assign[row, plan.assign.shape[1] - S :]
    columns = plan.valid[row].nonzero().flatten().tolist()
    members = [(assign == column).nonzero().flatten().tolist() for column in columns]
    visual = [bool(plan.is_visual[row, column]) for column in columns]
    with caught(dense) as (weights, states):
        setting = Setting(**setting_of(handle))
        logits = dense.logits(prompt, plan, row, answer, setting, cuts)
    layers = []
    for number, w in enumerate(weights):
        for cut in cuts:
            if cut.layer == number:
                members = [[s for m in some for s in members[m]] for some in cut.members]
                visual = [visual[i] for i in cut.source]
        T = len(members)
        layers.append((w[0].mean(0)[:T, :T], members, visual))
    return _straight(
        layers, inputs["input_ids"][0].tolist(), list(states[0][: len(members)]), logits
    )


@contextmanager
def caught(dense: Dense):
    """The attention weights [1, H, T, T] of every layer, and the states [T, C] behind the last."""
    weights, states = [], []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, out: weights.append(out[1]))
        for layer in dense.lm.layers
    ]
    hooks.append(
        dense.lm.register_forward_hook(lambda _, __, out: states.append(out.last_hidden_state[0]))
    )
    try:
        yield weights, states
    finally:
        for hook in hooks:
            hook.remove()


def _straight(layers, ids: list[int], states: list[Tensor], logits: Tensor) -> Straight:
    last_image = max(i for i, token in enumerate(ids) if token == IMAGE)
    share = {kind: [] for kind in KINDS}
    received = {kind: [] for kind in KINDS}
    for weight, members, visual in layers:
        asks = {
            "visual": [t for t, is_visual in enumerate(visual) if is_visual],
            "text": [t for t, some in enumerate(members) if min(some) > last_image],
            "last": [len(members) - 1],
        }
        equal_parts = torch.zeros(len(members), len(ids), dtype=torch.float64)
        for t, some in enumerate(members):
            equal_parts[t, some] = 1 / len(some)
        for kind, rows in asks.items():
            mass = weight[rows].mean(0)
            share[kind].append(float(mass[visual].sum()) if rows else float("nan"))
            received[kind].append(mass @ equal_parts)
    return Straight(share, received, states, members, visual, logits)
