"""The importance a method is handed: read off the vision tower without touching its output."""

from contextlib import contextmanager

import pytest
import torch
from hf_harness import NEW, attach, each_backend, each_family, forward, generate, stock
from naive import image_features, window_order

import restore_ext
from restore_ext.methods import METHODS, Method
from restore_ext.testing.models import (
    ADJACENT_IMAGES,
    IMAGE,
    ONE_IMAGE,
    RAGGED,
    TWO_IMAGES,
    Picture,
    image_tokens,
    make_inputs,
    tiny_model,
)

UNLIKE = [(3, Picture(12, 16), 2, Picture(4, 6), 2)]


@contextmanager
def spy(monkeypatch, **needs):
    """A method that keeps the first tokens and notes what it was given."""
    problems = []

    def first_tokens(problem, budget):
        problems.append(problem)
        return torch.arange(budget).expand(len(problem.scores), budget)

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "spy", Method(first_tokens, **{"scores": "cls", **needs}))
        yield problems


def seen_scores(monkeypatch, model, run, **options) -> list[torch.Tensor]:
    """The scores of each image, [N] each, in the order they were asked for."""
    return seen("scores", monkeypatch, model, run, **options)


def seen(what, monkeypatch, model, run, needs=None, **options) -> list[torch.Tensor]:
    """The same of another field of Problem, for a method that needs this."""
    with spy(monkeypatch, **(needs or {})) as problems:
        handle = attach(model, method="spy", **options)
        run(model)
        handle.detach()
    return [row for problem in problems for row in getattr(problem, what)]


@each_backend
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("feature_layer", "attention_of"), [(-2, 1), (-1, 2), (1, 0), (2, 1)])
def test_llavas_scores_are_the_cls_attention_of_the_layer_of_the_features(
    monkeypatch, backend, attn, feature_layer, attention_of
):
    inputs = make_inputs("llava", TWO_IMAGES)
    model, eager = tiny_model("llava", attn=attn), tiny_model("llava", attn="eager")
    model.config.vision_feature_layer = eager.config.vision_feature_layer = feature_layer
    with torch.no_grad():
        tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    want = tower.attentions[attention_of][:, :, 0, 1:].mean(1)
    scores = seen_scores(monkeypatch, model, lambda m: forward(m, inputs), backend=backend)
    assert torch.stack(scores).allclose(want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llavas_attention_received_is_the_mean_over_all_queries(monkeypatch, strategy):
    inputs = make_inputs("llava", TWO_IMAGES)
    model, eager = tiny_model("llava"), tiny_model("llava", attn="eager")
    with torch.no_grad():
        tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    want = tower.attentions[1].mean((1, 2))[:, strategy == "default" :]
    if strategy == "full":  # the CLS token is a feature: one more placeholder
        inputs["input_ids"] = one_more_image_token(inputs["input_ids"])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        model.config.vision_feature_select_strategy = strategy
    needs = {"scores": "received"}
    got = seen("scores", monkeypatch, model, lambda m: forward(m, inputs), needs)
    assert torch.stack(got).allclose(want, rtol=0, atol=1e-6)


def one_more_image_token(ids: torch.Tensor) -> torch.Tensor:
    """Before every image of one row."""
    (row,) = ids.tolist()
    longer = []
    for before, token in zip([None, *row], row, strict=False):
        longer += [token, token] if token == IMAGE and before != IMAGE else [token]
    return torch.tensor([longer])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_llavas_keys_are_those_of_the_scored_layer(monkeypatch, attn):
    inputs = make_inputs("llava", TWO_IMAGES)
    model, stock_model = tiny_model("llava", attn=attn), stock("llava")
    tower = stock_model.model.vision_tower
    layer = getattr(tower, "vision_model", tower).encoder.layers[1]
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[1]
        keys = layer.self_attn.k_proj(layer.layer_norm1(hidden))
    want = keys.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(2)[:, 1:]
    got = seen("metric", monkeypatch, model, lambda m: forward(m, inputs), {"metric": "keys"})
    assert torch.stack(got).allclose(want, rtol=0, atol=1e-5)


def test_llavas_tower_features_are_what_is_projected(monkeypatch):
    inputs = make_inputs("llava", TWO_IMAGES)
    with torch.no_grad():
        tower = stock("llava").model.vision_tower
        want = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    needs = {"metric": "tower"}
    model = tiny_model("llava")
    got = seen("metric", monkeypatch, model, lambda m: forward(m, inputs), needs)
    assert torch.stack(got).allclose(want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [ONE_IMAGE, UNLIKE])
def test_qwens_keys_are_means_over_the_patches_of_a_token(monkeypatch, rows):
    inputs = make_inputs("qwen2_5_vl", rows)
    model = tiny_model("qwen2_5_vl")
    got = seen("metric", monkeypatch, model, lambda m: forward(m, inputs), {"metric": "keys"})
    for keys, want in zip(got, tower_keys(inputs), strict=True):
        assert keys.allclose(want, rtol=0, atol=1e-5)


@each_backend
@pytest.mark.parametrize("rows", [ONE_IMAGE, TWO_IMAGES, UNLIKE])
def test_qwens_scores_are_the_mean_attention_received_in_its_last_full_block(
    monkeypatch, backend, rows
):
    inputs = make_inputs("qwen2_5_vl", rows)
    model = tiny_model("qwen2_5_vl")
    scores = seen_scores(monkeypatch, model, lambda m: forward(m, inputs), backend=backend)
    for got, want in zip(scores, received_attention(inputs), strict=True):
        assert (got / got.sum()).allclose(want / want.sum(), rtol=0, atol=1e-6)


def received_attention(inputs: dict) -> list[torch.Tensor]:
    """From the weights: softmax over each image's own patches, in the order of the features."""
    q, k = queries_and_keys(inputs)
    received, first = [], 0
    for tokens in image_tokens(inputs):
        mine = slice(first, first + 4 * tokens)
        attention = (q[:, mine] @ k[:, mine].mT / q.shape[-1] ** 0.5).softmax(-1)
        received.append(attention.mean((0, 1)))
        first += 4 * tokens
    return of_tokens(torch.cat(received), inputs)


def tower_keys(inputs: dict) -> list[torch.Tensor]:
    """[N, D] of each image, in the order of the features."""
    return of_tokens(queries_and_keys(inputs)[1].mean(0), inputs)


def of_tokens(patches: torch.Tensor, inputs: dict) -> list[torch.Tensor]:
    """Means over the patches of each token, which are in the tower's order, image by image."""
    by_window = patches.unflatten(0, (-1, 4)).mean(1)
    in_order = torch.empty_like(by_window)
    in_order[window_order(inputs["image_grid_thw"])] = by_window
    return list(in_order.split(image_tokens(inputs)))


@torch.no_grad()
def queries_and_keys(inputs: dict) -> list[torch.Tensor]:
    """[H, patches, D] of the last block of full attention, rotated."""
    tower = stock("qwen2_5_vl").model.visual
    block = tower.blocks[2].attn
    caught = {}

    def catch(_, args, options):
        caught["x"] = args[0] if args else options["hidden_states"]
        caught["cos"], caught["sin"] = options["position_embeddings"]

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    hook.remove()
    heads = stock("qwen2_5_vl").config.vision_config.num_heads
    q, k, _ = block.qkv(caught["x"]).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    return [rotated(t, caught["cos"], caught["sin"]) for t in (q, k)]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


@each_family
@each_backend
@pytest.mark.parametrize("rows", [ADJACENT_IMAGES, RAGGED])
def test_scores_do_not_depend_on_how_the_model_is_run(monkeypatch, family, backend, rows):
    """A forward, generate() and beams all hand over the same scores, once per image or per beam."""
    inputs = make_inputs(family, rows)
    model = tiny_model(family)
    want = seen_scores(monkeypatch, model, lambda m: forward(m, inputs), backend=backend)
    assert [len(scores) for scores in want] == image_tokens(inputs)
    greedy = seen_scores(monkeypatch, model, lambda m: generate(m, inputs), backend=backend)
    assert all(torch.equal(g, w) for g, w in zip(greedy, want, strict=True))
    beams = seen_scores(
        monkeypatch, model, lambda m: generate(m, inputs, num_beams=2), backend=backend
    )
    assert {nearest(scores, want) for scores in beams} == set(range(len(want)))


def nearest(scores: torch.Tensor, known: list[torch.Tensor]) -> int:
    """Which image these are the scores of: a batch of other size may change the last bits."""
    alike = [len(k) == len(scores) and k.allclose(scores, rtol=0, atol=1e-6) for k in known]
    assert sum(alike) == 1
    return alike.index(True)


@each_family
@each_backend
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_vision_tower_says_the_same_bits_while_it_is_watched(family, backend, attn):
    inputs = make_inputs(family, RAGGED)
    want = image_features(tiny_model(family, attn=attn), inputs)
    model = tiny_model(family, attn=attn)
    attach(model, backend=backend, method="vispruner")
    caught = []
    tower = model.model.multi_modal_projector if family == "llava" else model.model.visual.merger
    tower.register_forward_hook(lambda _, args, out: caught.append(out))
    for got, feature in zip(image_features(model, inputs), want, strict=True):
        assert torch.equal(got, feature)
    generate(model, inputs)
    assert torch.equal(caught[0], caught[1])


@each_family
@each_backend
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", ["divprune", "uniform", "random", "tome"])
def test_the_reduction_is_reduce_tokens_of_the_projected_features(family, backend, restore, method):
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    options = {"method": method, "keep_ratio": 0.4, "restore": restore, "seed": 5}
    options |= {"retain": 0.25, "anchor_mode": "official"}  # no default among them
    handle = attach(model, backend=backend, positions="original", **options)
    generate(model, inputs, max_new_tokens=NEW)
    for image, features in zip(handle.last.images, image_features(model, inputs), strict=True):
        want = restore_ext.reduce_tokens(features[None], **options)
        got = image.reduction
        for name in ("group", "position", "size", "kept", "merged"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.allclose(got.tokens, want.tokens, rtol=0, atol=1e-5)


@each_family
def test_two_images_of_one_batch_draw_the_same_random_tokens_as_alone(family):
    """The seed counts per image: a batch must not shift anyone's draw."""
    inputs = make_inputs(family, [(3, Picture(8, 8), 4), (3, Picture(8, 8), 4)])
    model = tiny_model(family)
    handle = attach(model, method="random", restore=False, positions="original", seed=2)
    forward(model, inputs)
    first, second = (image.reduction.position for image in handle.last.images)
    assert torch.equal(first, second)
