"""Work that configurations of one evaluation have in common is done once.

They see the same pictures one after another, pick with the same method and merge to the same
anchors; only what is made of it differs. What is shared here are pure functions of what they are
given: one that gets the very bits it got a moment ago gives what it gave then. All else runs:
attach(), the last vision layer's attention, which attach() reads, and of the language model what
is not a matrix product in front of a first cut.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from restore_ext import ops
from restore_ext.methods import METHODS

# Two budgets are asked of a method at a time: all of it, and the share that RESTORE retains.
KEPT = 2
# Operators, and of how many calls: attention is called once a layer, and has to remember all four.
OPERATORS = {"select_anchors": KEPT, "assign_anchors": KEPT, "calibrated_attention": 5}
# Layers of the language model in front of a first cut: what these compute, configurations share.
UNCUT = 2


@contextmanager
def shared_work(model: Any) -> Iterator[None]:
    """Inside, a LLaVA's vision tower and projector, the matrix products of the first layers of its
    language model, the methods, the anchors and calibrated attention remember."""
    tower = model.model.vision_tower
    *before, last = getattr(tower, "vision_model", tower).encoder.layers
    parts: list[nn.Module] = [*before, last.mlp, model.model.multi_modal_projector]
    for layer in model.model.language_model.layers[:UNCUT]:
        of = layer.self_attn
        parts += [of.q_proj, of.k_proj, of.v_proj, of.o_proj, layer.mlp]
    methods = dict(METHODS)
    operators = {name: getattr(ops, name) for name in OPERATORS}
    try:
        for part in parts:
            part.forward = Memory(part.forward, kept=1)
        for name, method in methods.items():
            METHODS[name] = dataclasses.replace(
                method,
                select=method.select and Memory(method.select),
                merge=method.merge and Memory(method.merge),
            )
        for name, operator in operators.items():
            setattr(ops, name, Memory(operator, OPERATORS[name]))
        yield
    finally:
        for part in parts:
            vars(part).pop("forward", None)
        METHODS.update(methods)
        for name, operator in operators.items():
            setattr(ops, name, operator)


@contextmanager
def remembered_features(model: Any, batches: int) -> Iterator[None]:
    """Inside, a LLaVA's vision tower remembers the pictures of so many forwards. Not for methods
    that watch the tower."""
    tower = model.model.vision_tower
    tower.forward = Memory(tower.forward, kept=batches)
    try:
        yield
    finally:
        del tower.forward


class Memory:
    """A function that remembers the calls it was last asked for."""

    def __init__(self, function: Callable[..., Any], kept: int = KEPT) -> None:
        self.function = function
        self.kept = kept
        self.calls: list[tuple[Any, Any]] = []  # what was asked and given, the latest last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = args, kwargs
        known = next((call for call in self.calls if _same(asked, call[0])), None)
        call = (asked, self.function(*args, **kwargs)) if known is None else known
        self.calls = [*(c for c in self.calls if c is not known), call][-self.kept :]
        return call[1]


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if dataclasses.is_dataclass(a):
        return _same(vars(a), vars(b))
    return bool(a == b)
