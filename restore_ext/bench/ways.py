"""The ways of answering that are compared: the model as it is, and each method, plain and not."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import restore_ext
from restore_ext.bench.generation import Inputs, generate
from restore_ext.methods import find_card
from restore_ext.methods.problem import INSIDE
from restore_ext.text import one_line

ALL_TOKENS = "all tokens"
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
GPU_ONLY = ("flash_attention_2", "flash_attention_3", "flex_attention")
# What attach() and transformers raise where a model cannot have what was asked of it.
REFUSALS = (ValueError, TypeError, NotImplementedError, ImportError)


class Refused(Exception):
    """A way that the model cannot go; the message says why."""


@dataclass(frozen=True)
class Way:
    """attach() with these options; without a method, the unhooked model."""

    method: str | None
    restore: bool
    options: dict[str, Any]

    @property
    def name(self) -> str:
        if self.method is None:
            return ALL_TOKENS
        return f"{self.method} + RESTORE" if self.restore else f"{self.method} plain"

    def attached(self, model: Any) -> AbstractContextManager[Any]:
        """Attached inside a `with` statement, whose value is the handle, or None.

        raises  Refused
        """
        if self.method is None:
            return nullcontext()
        try:
            return restore_ext.attach(
                model, method=self.method, restore=self.restore, **self.options
            )
        except REFUSALS as error:
            raise Refused(one_line(error)) from error


STOCK = Way(None, False, {})


def ways_of(
    methods: Sequence[str], keep: int, model: Any, inputs: Inputs, backend: str = "op"
) -> list[Way]:
    """Every method plain, and with RESTORE where that adds something; the unhooked model first.

    A method without a budget runs as it was published, `schedule` with `keep` tokens in the upper
    half of the layers.
    """
    ways = [STOCK]
    for method in dict.fromkeys(methods):
        options = {"backend": backend, **_budget(method, keep, model, inputs)}
        for restore in (False, True)[: 1 + find_card(method).restores]:
            ways.append(Way(method, restore, options))
    return ways


def _budget(method: str, keep: int, model: Any, inputs: Inputs) -> dict[str, Any]:
    if method == "schedule":
        depth = model.config.get_text_config().num_hidden_layers
        tokens = int((inputs["input_ids"] == model.config.image_token_id).sum(1).max())
        share, below = min(1.0, keep / max(tokens, 1)), -(-depth // 2)
        return {"options": {"layers": [1.0] * below + [share] * (depth - below)}}
    card = find_card(method)
    # A tower of few blocks cannot get below some budget: what it can do stands beside the others.
    return {"keep": keep} if card.budget else {}


def acts_inside(method: str) -> bool:
    """Whether it cuts inside the language model."""
    return find_card(method).place == INSIDE


def attentions(model: Any, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """(name, why not) of every stock attention; "" where the model runs with it.

    The model has the attention that was asked about last, if it runs with it.
    """
    for name in ATTENTIONS:
        if model.device.type != "cuda" and name in GPU_ONLY:
            yield name, "needs a GPU"
            continue
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(name)
            generate(model, inputs, 1)
        except (*REFUSALS, OSError, RuntimeError, torch.OutOfMemoryError) as error:
            model.set_attn_implementation(before)
            yield name, one_line(error)
        else:
            yield name, ""
