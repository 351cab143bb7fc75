"""Families of M-RoPE and of masks: an attached model against its own layers on dense biases."""

import pytest
import torch
from family_checks import (
    MASKS,
    MROPE,
    ROWS,
    TOLERANCE,
    assert_generates_dense,
    assert_same_bits,
    dense,
    model,
    row_inputs,
    said,
)
from hf_harness import assert_close, attach, each_backend, step
from naive import Setting

from restore_ext.methods import METHODS, find_method
from restore_ext.testing.models import (
    TEXT_ONLY,
    TWO_IMAGES,
    VERSION,
    join_rows,
    make_inputs,
)

each = pytest.mark.parametrize("family", [*MROPE, *MASKS])
PRUNED = {"size": False, "distance": False}
SETTINGS = [
    ({"calibrate": "size"}, {"distance": False}),
    ({"layer0": "size"}, {"uniform_first": False}),
    ({"decode_distance": True}, {"decode_distance": True}),
    ({"restore": False, "positions": "original"}, PRUNED),
]


@each
@each_backend
def test_a_ragged_batch_of_several_images_is_the_reference(family, backend):
    with attach(model(family), backend=backend) as handle:
        assert_generates_dense(family, handle)


@each
@pytest.mark.parametrize(("options", "setting"), SETTINGS, ids=lambda part: "-".join(part))
def test_every_setting_is_the_reference(family, options, setting):
    with attach(model(family), **options) as handle:
        assert_generates_dense(family, handle, ROWS[1:], **setting)


@each
@pytest.mark.parametrize(
    "method", sorted(name for name in METHODS if find_method(name).needs_scores)
)
def test_methods_that_need_scores_are_the_reference(family, method):
    with attach(model(family), method=method) as handle:
        assert_generates_dense(family, handle, TWO_IMAGES)


@each
def test_several_answers_of_a_row_are_the_reference(family):
    """generate() encodes once, and repeats the features for the answers. Where a row has two images
    stock GLM-4V has them in the wrong order, and before 5.18 so have others."""
    single = family == "glm4v" or (VERSION < (5, 18) and "qwen" not in family)
    rows, per_row = (ROWS[1:], [0, 1, 2, 3]) if single else (ROWS[:2], [0, 0, 1, 1, 2, 3])
    with attach(model(family)) as handle:
        assert_generates_dense(family, handle, rows, copies=2)
    assert [image.row for image in handle.last.images] == per_row


@each
def test_off_within_budget_text_alone_and_detached_are_the_same_bits(family):
    inputs, text = join_rows(row_inputs(family, ROWS)), make_inputs(family, TEXT_ONLY)
    want, want_text = said(family, inputs), said(family, text)
    with attach(model(family), keep=4096) as handle:
        assert_same_bits(family, inputs, want)
        assert handle.last is None
    with attach(model(family)) as handle:
        assert_same_bits(family, text, want_text)
        handle.enabled = False
        assert_same_bits(family, inputs, want)
        handle.enabled = True
        assert not torch.equal(said(family, inputs)[1], want[1])
    assert_same_bits(family, inputs, want)


@each
@each_backend
def test_tokens_that_go_on_together_are_the_reference(family, backend):
    """Several queries on the cache: a later turn of text, or drafts to be verified."""
    [inputs] = row_inputs(family, ROWS[2:])
    later = torch.arange(50, 60)
    with attach(model(family), backend=backend) as handle, torch.no_grad():
        first = model(family)(**inputs, use_cache=True)
        past, logical = first.past_key_values, inputs["input_ids"].shape[1]
        second = step(model(family), later[None], past, logical)
    got = torch.cat([first.logits[0, -1:], second.logits[0]])
    full, tokens = dense(family).prompt(inputs), [*later.tolist(), 0]
    want = dense(family).logits(full, handle.last.plan, 0, tokens, Setting())
    assert_close(got, want, TOLERANCE)
