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

from restore_ext import attach, reduce_tokens
from restore_ext.hf.parallel import Heads
from restore_ext.hf.scores import Asked, rater_weights
from restore_ext.hf.vision import recall
from restore_ext.methods import METHODS, TOWER_METHODS, find_method
from restore_ext.methods.problem import FEATURES
from restore_ext.reduce import ANCHOR_MODES
from restore_ext.testing.models import LLAVA_SIDE, PATCH, tiny_model


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


@pytest.mark.parametrize("method", [*METHODS, *TOWER_METHODS])
def test_the_tower_is_read_and_reduces_without_either(method):
    """Scores, keys and features as a method wants them, and what a method does in the tower."""
    model = tiny_model("llava").to("meta")
    side = LLAVA_SIDE * PATCH
    pixels = torch.empty(2, 3, side, side, device="meta")
    layer = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    with attach(model, method=method, keep=20, backend="mask"), torch.no_grad(), OneDevice():
        with NoNumbers():
            output = model.model.get_image_features(pixel_values=pixels, **layer)
        seen = recall(output)
    assert seen.images == 2 and seen.by_tower == (method in TOWER_METHODS)
    if seen.by_tower:
        left = {"tome_vit": 20, "downsample": 16}[method]
        assert [image.tokens.shape[1] for image in seen.reduced[1]] == [left] * 2
        return
    chosen = find_method(method)
    assert (seen.scores is not None) == chosen.needs_scores
    assert (seen.metric is not None) == (chosen.metric != FEATURES)


@pytest.mark.parametrize("backend", ["op", "mask"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bounded", [False, True])
def test_tokens_are_rated_inside_the_language_model_without_either(backend, rows, bounded):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    B, T, K = 2, 30, 33
    visual, text = (empty(B, T, dtype=torch.bool) for _ in range(2))
    position = {"query_position": empty(B, 1, rows, dtype=torch.int32)}
    position["key_position"] = empty(B, 1, K, dtype=torch.int32)
    told = {"log_size": empty(B, K), "decay": empty(1, 64), **position}
    if bounded:  # a sliding window, or an image that sees itself
        told |= {"causal": False, "key_range": empty(B, rows, 2, dtype=torch.int32)}
    with OneDevice(), NoNumbers():
        weight = rater_weights(empty(B, T, 16), visual, text, rows, draft=3)
        asked = Asked(rows, 3, weight if rows > 1 else None)
        query, key = empty(B, 4, rows, 32), empty(B, 2, K, 32)
        scores = asked.scores(query, key, told, {"scaling": 0.2}, backend)
        assert Heads(4, None).mean(scores, 4).shape == (B, K)


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
