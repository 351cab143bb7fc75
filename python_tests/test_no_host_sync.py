"""With a budget that is known, no method waits for the device, and so each can be captured.

On the "meta" device there are no values to read back: whatever asks for one (item, tolist, nonzero,
a mask as an index, a loop's condition) raises. What comes from the host would be a copy in the way
of a CUDA graph: modes refuse that.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from restore_ext import reduce_tokens
from restore_ext.methods import METHODS
from restore_ext.reduce import ANCHOR_MODES


class OneDevice(TorchDispatchMode):
    """Refuses every operation that a tensor of the host takes part in."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                raise RuntimeError(f"{func} brings a tensor of the host")
        return out


class NoNumbers(TorchFunctionMode):
    """Refuses to make tensors of numbers, which the meta device does unseen by a dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            raise RuntimeError(f"{func} brings numbers of the host")
        return func(*args, **(kwargs or {}))


def reduce(method, **given):
    x = torch.empty(2, 40, 8, device="meta")
    scores = torch.empty(2, 40, device="meta")
    with OneDevice(), NoNumbers():
        return reduce_tokens(x, method=method, scores=scores, **given)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_budget_reads_nothing_back_and_brings_nothing_along(method, restore):
    for keep in (1, 2, 15, 39, 40):
        r = reduce(method, keep=keep, restore=restore)
        assert r.tokens.shape == (2, keep, 8) and r.group.shape == (2, 40)
        assert r.size.shape == r.position.shape == r.kept.shape == r.merged.shape == (2, keep)
    assert reduce(method, keep_ratio=0.3, restore=restore).tokens.shape == (2, 12, 8)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("token_pooling", {"algorithm": "means", "iterations": 2}),
        ("visionzip", {"contextual_ratio": 1.0, "restore": False}),
        ("vispruner", {"step": 3}),
        ("holov", {"num_chunks": 7}),
        ("tome", {"share": 0.1}),
        *[("divprune", {"anchor_mode": mode, "retain": 0.0}) for mode in ANCHOR_MODES],
    ],
)
def test_neither_does_an_option_of_a_method(method, options):
    assert reduce(method, keep=11, **options).tokens.shape == (2, 11, 8)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: int(x.argmax()),
        lambda x: bool(x.any()),
        lambda x: torch.unique(x),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1, 2], device=x.device) + x[:2],
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.arange(2).to(x.device),
    ],
)
def test_this_test_would_notice(reads):
    with pytest.raises((RuntimeError, NotImplementedError)), OneDevice(), NoNumbers():
        reads(torch.empty(8, device="meta"))
