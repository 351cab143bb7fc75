"""downsample: what the stock model says of a smaller picture, and nothing else."""

import numpy as np
import pytest
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
    stock,
)
from test_hf_tome_vit import scale_of

import restore_ext
from restore_ext.hf.images import reduce_images
from restore_ext.hf.vision import Seen
from restore_ext.methods.downsample import cells, smaller_grid
from restore_ext.testing.models import (
    IMAGE,
    LLAVA_SIDE,
    ONE_IMAGE,
    PATCH,
    RAGGED,
    TWO_IMAGES,
    make_inputs,
    single_row,
    tiny_model,
)

BUDGETS = [(1, 1), (3, 1), (4, 2), (20, 4), (36, 6), (48, 6), (63, 7)]  # keep, side of the grid


def cubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(x: np.ndarray, size: int) -> np.ndarray:
    """[..., L, L] to [..., size, size]: Keys' cubic kernel, as wide as the step."""
    length = x.shape[-1]
    step = length / size
    weight = np.array(
        [[cubic((i + 0.5 - (o + 0.5) * step) / step) for i in range(length)] for o in range(size)]
    )
    weight /= weight.sum(1, keepdims=True)
    return weight @ x @ weight.T


def test_the_grid_is_the_largest_of_its_shape():
    for side in range(1, 25):
        for budget in range(1, side * side + 1):
            height, width = smaller_grid(side, side, budget)
            assert height == width and height**2 <= budget < (height + 1) ** 2
    assert smaller_grid(12, 24, 72) == (6, 12) and smaller_grid(24, 12, 72) == (12, 6)
    assert smaller_grid(2, 20, 4) == (1, 4) and smaller_grid(20, 2, 9) == (9, 1)
    for rows, columns in ((5, 9), (9, 5), (1, 7), (3, 4)):
        for budget in range(1, rows * columns + 1):
            height, width = smaller_grid(rows, columns, budget)
            assert 1 <= height <= rows and 1 <= width <= columns and height * width <= budget


def test_a_patch_belongs_to_the_cell_its_middle_lies_in():
    for rows, columns, height, width in ((8, 8, 3, 3), (7, 9, 7, 2), (5, 5, 1, 1), (6, 6, 4, 4)):
        got = cells(rows, columns, height, width, torch.device("cpu")).view(rows, columns)
        for r in range(rows):
            for c in range(columns):
                row, column = (r + 0.5) / rows * height, (c + 0.5) / columns * width
                assert got[r, c] == int(row) * width + int(column)
        assert len(got.unique()) == height * width


@torch.no_grad()
def smaller(inputs: dict, side: int) -> torch.Tensor:
    """[S, V] what the stock model says of one row whose pictures have side x side patches."""
    model = stock("llava")
    pixels = resized(inputs["pixel_values"].double().numpy(), side * PATCH)
    tower = model.model.vision_tower(
        torch.tensor(pixels).float(), interpolate_pos_encoding=True, output_hidden_states=True
    )
    features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
    assert features.shape[1] == side**2
    ids, left = [], 0
    for token in inputs["input_ids"][0].tolist():
        left = (left or LLAVA_SIDE**2) - 1 if token == IMAGE else 0
        if token != IMAGE or left >= LLAVA_SIDE**2 - side**2:
            ids.append(token)
    ids = torch.tensor([ids])
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
    return model(inputs_embeds=embeds).logits[0]


@each_backend
@pytest.mark.parametrize(("keep", "side"), BUDGETS)
def test_it_is_the_stock_model_on_a_smaller_picture(backend, keep, side):
    inputs = make_inputs("llava", TWO_IMAGES)
    model = tiny_model("llava")
    handle = attach(model, method="downsample", keep=keep, backend=backend)
    got = forward(model, inputs)[0]
    assert_close(got, smaller(inputs, side), tolerance=1e-4)
    for image in handle.last.images:
        r = image.reduction
        assert image.tokens_after == side**2 and r.size.sum() == LLAVA_SIDE**2
        assert r.merged.all() and not r.kept.any()
        assert (r.position[:, 1:] > r.position[:, :-1]).all()
        for m in range(side**2):
            members = (r.group[0] == m).nonzero().flatten().tolist()
            assert r.position[0, m] == members[(len(members) - 1) // 2]
            assert r.size[0, m] == len(members)


@torch.no_grad()
def test_paligemmas_features_are_those_of_a_smaller_picture():
    inputs = make_inputs("paligemma", TWO_IMAGES)
    model, inner = tiny_model("paligemma"), stock("paligemma").model
    handle = attach(model, method="downsample", keep=20)
    forward(model, inputs)
    pixels = torch.tensor(resized(inputs["pixel_values"].double().numpy(), 4 * PATCH)).float()
    tower = inner.vision_tower(pixels, interpolate_pos_encoding=True)
    want = inner.multi_modal_projector(tower.last_hidden_state) / scale_of("paligemma")
    for image, features in zip(handle.last.images, want, strict=True):
        assert image.tokens_after == 16
        assert_close(image.reduction.tokens[0], features, tolerance=1e-4)


@pytest.mark.parametrize("restore", [True, False])
def test_a_ragged_batch_and_its_answers_are_those_of_its_rows(restore):
    inputs = make_inputs("llava", RAGGED)
    model = tiny_model("llava")
    attach(model, method="downsample", keep=17, restore=restore)
    out = generate(model, inputs)
    for row in range(2):
        alone = single_row(inputs, row)
        assert_close(logits(out)[row, 0], smaller(alone, 4)[-1], tolerance=1e-4)
        assert torch.equal(answers(generate(model, alone), alone)[0], answers(out, inputs)[row])


def test_beams_and_a_whole_picture_and_detaching():
    inputs = make_inputs("llava", ONE_IMAGE)
    model = fresh("llava")
    before, want = fingerprint(model), forward(model, inputs)
    handle = attach(model, method="downsample", keep=16)
    one = generate(model, inputs, num_beams=2, num_return_sequences=1)
    assert handle.last.images[0].tokens_after == 16 and one.sequences.shape[0] == 1
    handle.enabled = False
    assert torch.equal(forward(model, inputs), want)
    attach(model, method="downsample", keep=64)
    assert torch.equal(forward(model, inputs), want)
    attach(model, method="downsample", keep_ratio=1.0).detach()
    assert torch.equal(forward(model, inputs), want) and fingerprint(model) == before


def test_original_positions_and_sizes_can_be_asked_for():
    inputs = make_inputs("llava", ONE_IMAGE)
    model = tiny_model("llava")
    plain = attach(model, method="downsample", keep=16)
    first = forward(model, inputs)
    assert plain.settings.positions == "reindex" and plain.settings.calibrate == "none"
    attach(model, method="downsample", keep=16, positions="original", calibrate="size+distance")
    assert not torch.allclose(first, forward(model, inputs), atol=1e-3)


@pytest.mark.parametrize(
    ("family", "given", "error", "message"),
    [
        ("qwen2_5_vl", {}, NotImplementedError, "downsample .*got qwen2_5_vl, .*; .* max_pixels"),
        ("llava_next", {}, NotImplementedError, "downsample .*tiles .*; .* image_grid_pinpoints"),
        ("gemma3", {}, NotImplementedError, "downsample .*of several patches$"),
        ("llava", {"keep": [4]}, ValueError, r"one int .* downsample.* got keep=\(4,\)"),
        ("llava", {"budget": "shared"}, ValueError, "downsample.* got keep=20 and budget='shared'"),
        ("llava", {"options": {"side": 2}}, TypeError, "downsample has no option 'side'"),
    ],
)
def test_refuses_where_it_has_no_meaning(family, given, error, message):
    model = tiny_model(family)
    with pytest.raises(error, match=message):
        attach(model, **{"method": "downsample", "keep": 20, **given})
    assert not hasattr(model, "_restore_ext_handle")


@pytest.mark.parametrize("method", ["downsample", "tome_vit"])
def test_a_picture_within_its_budget_can_be_cut_inside_all_the_same(method):
    inputs = make_inputs("llava", ONE_IMAGE)
    model = tiny_model("llava")
    inside = {"schedule": {"layers": [1.0, 1.0, 0.3, 0.3]}, "positions": "original"}
    restore_ext.attach(model, **inside, calibrate="size")
    want = forward(model, inputs)
    handle = attach(model, method=method, keep=64, **inside, calibrate="size")
    assert torch.equal(forward(model, inputs), want)
    assert [layer.visual for layer in handle.last.layers] == [[64], [64], [19], [19]]


@pytest.mark.parametrize(
    ("method", "seen"),
    [("uniform", Seen(1, by_tower=True)), ("downsample", Seen(1)), ("tome_vit", Seen(1))],
)
def test_features_encoded_for_one_method_are_not_for_another(method, seen):
    settings = attach(tiny_model("llava"), method=method, keep=16).settings
    features = [torch.randn(64, 8)]
    with pytest.raises(ValueError, match=f"method '{method}' does not fit features"):
        reduce_images(features, seen, [[0]], settings, encoded_once=True, refuse=lambda: None)
