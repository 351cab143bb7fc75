"""tome_vit: the tower with tokens merged in every block, written out in loops and float64."""

import numpy as np
import pytest
import straight_line
import torch
from hf_harness import (
    answers,
    assert_close,
    attach,
    each_backend,
    fingerprint,
    forward,
    fresh,
    generate,
    logits,
    naive,
    reduced_row,
    stock,
)
from naive import Setting, image_features

from restore_ext.methods.tome_vit import pairs_per_block
from restore_ext.testing.models import (
    LLAVA_SIDE,
    ONE_IMAGE,
    RAGGED,
    TEXT,
    TWO_IMAGES,
    VERSION,
    make_inputs,
    tiny_model,
)

N = LLAVA_SIDE**2
NEAR_TIE = 1e-5
NOT_PATCH_BY_PATCH = ("qwen2_5_vl", "llava_onevision", "gemma3", "smolvlm")


def straight_tower(pixels, keep, *, family="llava", layers=2, class_token=True):
    """One picture [3, H, W]: groups of patches in order, projected features, the closest call."""
    model = stock(family).model
    tower = getattr(model.vision_tower, "vision_model", model.vision_tower)
    vision = stock(family).config.vision_config
    heads, eps = vision.num_attention_heads, vision.layer_norm_eps
    weights = {name: w.double().numpy() for name, w in tower.state_dict().items()}
    tally = straight_line.Tally()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    with torch.no_grad():
        patches = tower.embeddings(pixels[None]).double()[0].numpy()
    x = patches if family == "paligemma" else norm(patches, "pre_layrnorm")
    groups, size = [[i] for i in range(len(x))], np.ones(len(x))
    tokens = len(x) - class_token
    for layer in range(layers):
        name = f"encoder.layers.{layer}"
        y = norm(x, f"{name}.layer_norm1")
        q, k, v = (
            linear(y, f"{name}.self_attn.{p}_proj").reshape(len(y), heads, -1).swapaxes(0, 1)
            for p in "qkv"
        )
        logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + np.log(size)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        out = (share / share.sum(-1, keepdims=True)) @ v
        x = x + linear(out.swapaxes(0, 1).reshape(len(x), -1), f"{name}.self_attn.out_proj")
        r = len(x) - class_token - kept_after(tokens, keep, layers)[layer]
        x, groups, size = merged(x, k.mean(0), groups, size, r, class_token, tally)
        y = linear(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        if family == "paligemma":  # gelu_pytorch_tanh
            y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        else:  # quick_gelu
            y = y / (1 + np.exp(-1.702 * y))
        x = x + linear(y, f"{name}.mlp.fc2")
    x = norm(x, "post_layernorm") if family == "paligemma" else x
    groups, x = groups[class_token:], x[class_token:]
    with torch.no_grad():
        features = model.multi_modal_projector(torch.tensor(x).float()) / scale_of(family)
    patches = [[i - class_token for i in sorted(group)] for group in groups]
    order = sorted(range(len(groups)), key=lambda g: patches[g][(len(patches[g]) - 1) // 2])
    return [patches[g] for g in order], features[order], tally.closest


def scale_of(family: str) -> float:
    """What a model divides its projected features by."""
    scales = family == "paligemma" and VERSION < (5, 0)
    return TEXT["hidden_size"] ** 0.5 if scales else 1.0


def kept_after(tokens, keep, layers):
    """Tokens left after each block: the same number less in each, and never less than half."""
    after = []
    for layer in range(1, layers + 1):
        even = tokens - int((tokens - keep) * layer / layers)
        after.append(min(even, keep * 2 ** (layers - layer)))
    return after


def merged(x, keys, groups, size, r, class_token, tally):
    evens = [i for i in range(0, len(x), 2) if i or not class_token]
    found = []
    for e in evens:
        alike = [straight_line.cosine(keys[e], keys[o]) for o in range(1, len(x), 2)]
        at = straight_line.best(alike, tally)
        found.append((alike[at], 2 * at + 1))
    order = straight_line.by_falling([alike for alike, _ in found])
    if 0 < r < len(order):
        tally.fell_by(found[order[r - 1]][0] - found[order[r]][0])
    total, weight, groups = x * size[:, None], size.copy(), [list(group) for group in groups]
    gone = set()
    for place in order[:r]:
        source, target = evens[place], found[place][1]
        total[target] += total[source]
        weight[target] += weight[source]
        groups[target] += groups[source]
        gone.add(source)
    stays = [i for i in range(len(x)) if i not in gone]
    return (total / weight[:, None])[stays], [groups[i] for i in stays], weight[stays]


def compare(inputs, handle, keep, **tower):
    agreed = 0
    for image, pixels in zip(handle.last.images, inputs["pixel_values"], strict=True):
        groups, features, closest = straight_tower(pixels, keep, **tower)
        if closest < NEAR_TIE:
            continue
        r = image.reduction
        for m, members in enumerate(groups):
            assert (r.group[0] == m).nonzero().flatten().tolist() == members
            assert r.size[0, m] == len(members)
            assert r.position[0, m] == members[(len(members) - 1) // 2]
        assert_close(r.tokens[0], features)
        agreed += 1
    assert agreed


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [16, 17, 21, 32, 33, 50, 63])
def test_the_tower_is_the_one_of_the_formulas(attn, keep):
    inputs = make_inputs("llava", RAGGED)
    model = tiny_model("llava", attn=attn)
    handle = attach(model, method="tome_vit", keep=keep)
    forward(model, inputs)
    compare(inputs, handle, keep)


@pytest.mark.parametrize(("attn", "keep"), [("sdpa", 8), ("eager", 21), ("sdpa", 63)])
def test_paligemma_is_merged_before_the_norm_behind_its_blocks(attn, keep):
    inputs = make_inputs("paligemma", RAGGED)
    model = tiny_model("paligemma", attn=attn)
    handle = attach(model, method="tome_vit", keep=keep)
    forward(model, inputs)
    compare(inputs, handle, keep, family="paligemma", layers=3, class_token=False)


@pytest.mark.parametrize(("feature_layer", "blocks", "keep"), [(-1, 3, 9), (1, 1, 40), (-3, 1, 33)])
def test_it_merges_in_front_of_the_features_alone(feature_layer, blocks, keep):
    inputs = make_inputs("llava", TWO_IMAGES)
    model = tiny_model("llava")
    model.config.vision_feature_layer = feature_layer
    handle = attach(model, method="tome_vit", keep=keep)
    forward(model, inputs)
    compare(inputs, handle, keep, layers=blocks)


def test_the_pairs_are_even_and_leave_the_budget():
    for tokens in (1, 2, 7, 64, 100, 576):
        for blocks in (1, 2, 5, 23):
            for keep in range(-(-tokens // 2**blocks), tokens + 1):
                left = tokens
                for r in pairs_per_block(tokens, keep, blocks):
                    assert 0 <= r <= left // 2
                    left -= r
                assert left == keep
    assert set(pairs_per_block(576, 116, 23)) == {20}
    assert pairs_per_block(8, 1, 3) == [4, 2, 1]


@each_backend
def test_with_restore_it_is_the_naive_model(backend):
    inputs = make_inputs("llava", RAGGED)
    model = tiny_model("llava")
    handle = attach(model, method="tome_vit", keep=20, backend=backend)
    out = generate(model, inputs)
    for row, tokens in enumerate(answers(out, inputs)):
        prompt = reduced_row("llava", inputs, handle, row, Setting())
        plan = handle.last.plan
        visual = plan.is_visual[row][plan.valid[row]]
        mine = [i.reduction.tokens[0] for i in handle.last.images if i.row == row]
        prompt.x[visual] = torch.cat(mine).double()  # the tower's, see the tests above
        assert_close(logits(out)[row], naive("llava").logits(prompt, tokens.tolist(), Setting()))
    assert all(image.reduction.size.sum() == N for image in handle.last.images)
    handle = attach(model, method="tome_vit", keep=20, restore=False, backend=backend)
    assert (handle.settings.positions, handle.settings.calibrate) == ("reindex", "none")
    generate(model, inputs, num_beams=2)
    assert all(image.tokens_after == 20 for image in handle.last.images)


def test_where_nothing_is_merged_the_tower_is_stock():
    inputs = make_inputs("llava", ONE_IMAGE)
    model = fresh("llava")
    before, want = fingerprint(model), forward(model, inputs)
    features = image_features(model, inputs)
    handle = attach(model, method="tome_vit", keep=N)
    assert torch.equal(forward(model, inputs), want) and handle.last is None
    handle = attach(model, method="tome_vit", keep=20)
    short = forward(model, inputs)
    assert not torch.equal(short, want[:, : short.shape[1]])
    handle.enabled = False
    assert torch.equal(forward(model, inputs), want)
    assert torch.equal(image_features(model, inputs)[0], features[0])
    handle.detach()
    assert torch.equal(forward(model, inputs), want) and fingerprint(model) == before


def test_a_gradient_reaches_the_picture():
    inputs = make_inputs("llava", ONE_IMAGE)
    model = tiny_model("llava")
    attach(model, method="tome_vit", keep=20, backend="mask")
    pixels = inputs["pixel_values"].requires_grad_()
    weight = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    (model(**inputs).logits[:, -1] * weight).sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().amax((0, 1)).gt(0).all()


@pytest.mark.parametrize(
    ("family", "given", "error", "message"),
    [
        *(
            (family, {}, NotImplementedError, f"tome_vit .*got {family}, which .*; .*tome")
            for family in NOT_PATCH_BY_PATCH
        ),
        ("llava", {"keep": [4]}, ValueError, r"keep must be one int .* tome_vit"),
        ("llava", {"budget": "shared"}, ValueError, "tome_vit.* budget='shared'"),
    ],
)
def test_refuses_where_it_has_no_meaning(family, given, error, message):
    model = tiny_model(family)
    with pytest.raises(error, match=message):
        attach(model, **{"method": "tome_vit", "keep": 20, **given})
    assert not hasattr(model, "_restore_ext_handle")


def test_a_tower_that_would_be_recomputed_is_refused():
    inputs = make_inputs("llava", ONE_IMAGE)
    model = tiny_model("llava").train()
    model.gradient_checkpointing_enable()
    attach(model, method="tome_vit", keep=20, backend="mask")
    with pytest.raises(NotImplementedError, match="tome_vit needs a vision tower without"):
        model(**inputs, use_cache=False)
    model.model.vision_tower.gradient_checkpointing_disable()
    model(**inputs, use_cache=False).logits.sum().backward()
    recomputed = model.model.multi_modal_projector.linear_1.weight.grad
    plain = tiny_model("llava").train()
    attach(plain, method="tome_vit", keep=20, backend="mask")
    plain(**inputs, use_cache=False).logits.sum().backward()
    assert_close(recomputed, plain.model.multi_modal_projector.linear_1.weight.grad)


def test_refuses_layers_and_budgets_it_cannot_serve():
    inputs = make_inputs("llava", ONE_IMAGE)
    model = tiny_model("llava")
    with pytest.raises(ValueError, match=r"keep must be at least 16 for .* tome_vit.* got 15"):
        attach(model, method="tome_vit", keep=15)
    attach(model, method="tome_vit", keep=16)
    forward(model, inputs)
    attach(model, method="tome_vit", keep=20)
    for layer in (-1, -3, 1):
        with pytest.raises(NotImplementedError, match=r"_feature_layer must|in model\.config"):
            forward(model, inputs, vision_feature_layer=layer)
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(NotImplementedError, match=r"features of one layer, got .* \[-2, -1\]"):
        attach(model, method="tome_vit", keep=20)
    model = tiny_model("llava")
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"adds log.* must be sdpa or eager .* 'flash_attention_2'"
    ):
        attach(model, method="tome_vit", keep=20)
