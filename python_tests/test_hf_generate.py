"""Cached generate() of an attached model against the naive, cache-free one: greedy decoding."""

import pytest
import torch
from hf_harness import (
    BACKENDS,
    NEW,
    answers,
    assert_close,
    assert_is_naive,
    attach,
    each_backend,
    each_family,
    expected,
    forward,
    generate,
    logits,
    stock,
)
from naive import Naive, Setting

from restore_ext.methods import METHODS
from restore_ext.testing.models import (
    ADJACENT_IMAGES,
    IMAGE,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    Picture,
    image_tokens,
    make_inputs,
    single_row,
    tiny_model,
)

# attach options, and what they mean to the naive model
SETTINGS = [
    ({}, {}),
    ({"positions": "original"}, {}),
    ({"calibrate": "size+distance"}, {}),
    ({"calibrate": "size"}, {"distance": False}),
    ({"calibrate": "none"}, {"size": False, "distance": False}),
    ({"layer0": "size"}, {"uniform_first": False}),
    ({"layer0": "size", "calibrate": "size"}, {"uniform_first": False, "distance": False}),
    ({"decode_distance": True}, {"decode_distance": True}),
    (
        {"decode_distance": True, "layer0": "size"},
        {"decode_distance": True, "uniform_first": False},
    ),
    ({"retain": 0.0}, {}),
    ({"retain": 1.0}, {}),
    ({"anchor_mode": "official"}, {}),
]
PRUNED = {"size": False, "distance": False}  # what restore=False does to attention: nothing
REINDEXED = [
    ({"positions": "reindex"}, {"reindex": True}),
    ({"positions": "reindex", "decode_distance": True}, {"reindex": True, "decode_distance": True}),
    ({"restore": False}, {"reindex": True, **PRUNED}),
    ({"restore": False, "positions": "original"}, PRUNED),
    ({"restore": False, "calibrate": "size"}, {"reindex": True, "distance": False}),
    ({"restore": False, "positions": "original", "calibrate": "size+distance"}, {}),
]


def one(options: dict) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "defaults"


@each_family
@each_backend
@pytest.mark.parametrize(("options", "setting"), SETTINGS, ids=[one(o) for o, _ in SETTINGS])
def test_every_setting_is_the_naive_model(family, backend, options, setting):
    inputs = make_inputs(family)
    model = tiny_model(family)
    handle = attach(model, backend=backend, **options)
    assert_is_naive(family, inputs, handle, generate(model, inputs), **setting)


@each_backend
@pytest.mark.parametrize(("options", "setting"), REINDEXED, ids=[one(o) for o, _ in REINDEXED])
def test_every_way_to_prune_and_reindex_is_the_naive_model(backend, options, setting):
    for rows in (TWO_IMAGES, RAGGED):
        inputs = make_inputs("llava", rows)
        model = tiny_model("llava")
        handle = attach(model, backend=backend, **options)
        assert_is_naive("llava", inputs, handle, generate(model, inputs), **setting)


@each_backend
@pytest.mark.parametrize("positions", [None, "original"])
def test_a_pruned_mrope_model_keeps_its_positions_and_is_the_naive_model(backend, positions):
    inputs = make_inputs("qwen2_5_vl", RAGGED)
    model = tiny_model("qwen2_5_vl")
    handle = attach(model, backend=backend, restore=False, positions=positions)
    assert_is_naive("qwen2_5_vl", inputs, handle, generate(model, inputs), **PRUNED)


@each_family
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_the_naive_model(family, method, restore):
    inputs = make_inputs(family, TWO_IMAGES)
    model = tiny_model(family)
    options = {} if restore else {"positions": "original", "calibrate": "none"}
    handle = attach(model, method=method, restore=restore, **options)
    out = generate(model, inputs)
    assert_is_naive(family, inputs, handle, out, **({} if restore else PRUNED))
    merges = restore or METHODS[method].merge is not None
    assert all(bool(image.reduction.merged.any()) == merges for image in handle.last.images)


@each_family
@each_backend
@pytest.mark.parametrize("rows", [TWO_IMAGES, ADJACENT_IMAGES, RAGGED])
def test_two_images_adjacent_images_and_ragged_batches_are_the_naive_model(family, backend, rows):
    inputs = make_inputs(family, rows)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    assert_is_naive(family, inputs, handle, generate(model, inputs))


@each_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@each_backend
def test_both_stock_attentions_are_the_naive_model(family, attn, backend):
    inputs = make_inputs(family)
    model = tiny_model(family, attn=attn)
    handle = attach(model, backend=backend)
    assert_is_naive(family, inputs, handle, generate(model, inputs))


@each_family
@each_backend
def test_a_ragged_left_padded_batch_equals_its_rows(family, backend):
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    attach(model, backend=backend)
    together = generate(model, inputs)
    for row in range(2):
        alone = single_row(inputs, row)
        out = generate(model, alone)
        assert_close(logits(together)[row], logits(out)[0])
        assert torch.equal(answers(together, inputs)[row], answers(out, alone)[0])


@each_family
@each_backend
def test_a_right_padded_batch_equals_its_rows(family, backend):
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    rows = [forward(model, single_row(inputs, row))[0] for row in range(2)]
    lengths = inputs["attention_mask"].sum(1).tolist()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            rolled = [r.roll(n - len(r)) for r, n in zip(inputs[name], lengths, strict=True)]
            inputs[name] = torch.stack(rolled)
    assert inputs["attention_mask"][0, 0] == 1 and inputs["attention_mask"].min() == 0
    together = forward(model, inputs)
    for row in range(2):
        assert_close(together[row, handle.last.plan.valid[row]], rows[row])


@each_family
@each_backend
def test_a_missing_attention_mask_means_that_all_is_seen(family, backend):
    inputs = make_inputs(family, TWO_IMAGES)
    model = tiny_model(family)
    attach(model, backend=backend)
    want = forward(model, inputs)
    del inputs["attention_mask"]
    assert_close(forward(model, inputs), want)


@each_backend
def test_text_inside_an_images_tokens_is_no_part_of_it(backend):
    """A separator, as some models set between the rows of an image's tokens."""
    inputs, model = make_inputs("llava", [(5, Picture(), 7)]), tiny_model("llava")
    at = 5 + image_tokens(inputs)[0] // 2
    for name, value in (("input_ids", 77), ("attention_mask", 1)):
        before, behind = inputs[name][:, :at], inputs[name][:, at:]
        inputs[name] = torch.cat([before, torch.tensor([[value]]), behind], 1)
    handle = attach(model, backend=backend, keep=9)
    assert_is_naive("llava", inputs, handle, generate(model, inputs))
    plan, [image] = handle.last.plan, handle.last.images
    assert (image.start, image.tokens_before, image.tokens_after) == (5, 64, 9)
    assert plan.valid.sum() == 5 + 9 + 1 + 7
    column = int(plan.assign[0, at])
    assert column >= 0 and (plan.assign[0] == column).sum() == 1
    assert plan.source[0, column] == at
    assert plan.size[0, column] == plan.uniform[0, column] == 1
    assert not plan.is_visual[0, column]


@each_family
@each_backend
def test_keep_counts_per_image(family, backend):
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    handle = attach(model, backend=backend, keep=[5, 11, 3])
    assert_is_naive(family, inputs, handle, generate(model, inputs))
    assert [image.tokens_after for image in handle.last.images] == [5, 11, 3]
    assert [image.row for image in handle.last.images] == [0, 0, 1]


@each_family
@each_backend
def test_an_image_within_its_budget_is_left_alone_beside_one_that_is_not(family, backend):
    inputs = make_inputs(family, TWO_IMAGES)
    model = tiny_model(family)
    handle = attach(model, backend=backend, keep=[6, 64])
    assert_is_naive(family, inputs, handle, generate(model, inputs))
    first, second = handle.last.images
    assert first.tokens_after == 6
    assert second.tokens_after == second.tokens_before
    start, length = second.start, second.tokens_before
    source = handle.last.plan.source[0]
    untouched = (source >= start) & (source < start + length)
    assert handle.last.plan.size[0, untouched].eq(1).all()
    assert handle.last.plan.uniform[0, untouched].eq(1).all()


@each_family
@each_backend
def test_a_row_within_its_budget_is_stock_beside_one_that_is_not(family, backend):
    """Nothing is reduced in row 1, nor has row 2 an image: they see no calibration at all."""
    rows = [(5, Picture(8, 12), 7), (9, Picture(6, 10), 4), (11,)]
    inputs = make_inputs(family, rows)
    model = tiny_model(family)
    handle = attach(model, backend=backend, keep=[6, 64])
    out = generate(model, inputs)
    for row in (1, 2):
        assert_close(logits(out)[row], logits(generate(stock(family), single_row(inputs, row)))[0])
    assert_close(logits(out)[0], expected(family, inputs, handle, answers(out, inputs)[0]))


@each_family
def test_the_two_backends_say_the_same_at_every_position(family):
    inputs = make_inputs(family, RAGGED)
    outputs = []
    for backend in BACKENDS:
        model = tiny_model(family)
        handle = attach(model, backend=backend)
        outputs.append(forward(model, inputs)[handle.last.plan.valid])
    assert_close(outputs[1], outputs[0])


@each_family
@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_to_the_truth_as_a_low_precision_mask(family, backend, dtype):
    """Against the naive float64 model of the same rounded weights; stock's error is the scale."""
    inputs = make_inputs(family)
    model = tiny_model(family).to(dtype)
    plain = forward(model, inputs)[0, -1]
    truth = Naive(model)
    full = truth.prompt(inputs)
    stock_error = (plain - truth.forward(full, Setting(**PRUNED))[-1]).abs().max()
    handle = attach(model, backend=backend)
    got = forward(model, inputs)[0, -1]
    prompt = truth.reduced(full, handle.last.plan, 0, Setting())
    want = truth.forward(prompt, Setting())[-1]
    assert (got - want).abs().max() <= 3 * stock_error


@each_family
@each_backend
def test_a_generated_token_may_be_the_image_token(family, backend):
    """Placeholders are images only where the forward brings images."""
    inputs = make_inputs(family)
    model = tiny_model(family)
    handle = attach(model, backend=backend)

    def force(_, scores):
        scores = scores.clone()
        scores[:, IMAGE] = scores.max() + 1
        return scores

    out = generate(model, inputs, logits_processor=[force])
    assert answers(out, inputs).tolist() == [[IMAGE] * NEW]
    assert_is_naive(family, inputs, handle, out)


@each_family
def test_sampling_draws_from_the_reduced_models_logits(family):
    inputs = make_inputs(family)
    model = tiny_model(family)
    handle = attach(model)
    torch.manual_seed(0)
    out = generate(model, inputs, do_sample=True, top_k=20)
    assert_is_naive(family, inputs, handle, out)


@each_family
def test_a_model_that_has_answered_before_answers_the_same_again(family):
    """No state of one call leaks into the next, whatever came between."""
    inputs, model = make_inputs(family), tiny_model(family)
    attach(model)
    first = logits(generate(model, inputs))
    for rows in (RAGGED, TEXT_ONLY, TWO_IMAGES):
        generate(model, make_inputs(family, rows, seed=3))
    assert torch.equal(logits(generate(model, inputs)), first)


@each_family
def test_the_longer_image_pays_when_images_differ(family):
    """keep_ratio counts per image: each gives up its own share."""
    inputs = make_inputs(family, [(3, Picture(4, 4), 2, Picture(12, 12), 3), *ONE_IMAGE])
    model = tiny_model(family)
    handle = attach(model, keep_ratio=0.5)
    assert_is_naive(family, inputs, handle, generate(model, inputs))
    for image in handle.last.images:
        assert image.tokens_after == image.tokens_before // 2
