"""prepare_inputs() by every kind of method, on a model that another is attached to."""

import pytest
import torch
from family_checks import row_totals
from hf_harness import assert_close, attach, each_family, generate, logits

import restore_ext
from restore_ext.methods import TOWER_METHODS
from restore_ext.testing.models import FAMILIES, ONE_IMAGE, TWO_IMAGES, make_inputs, tiny_model


@each_family
@pytest.mark.parametrize("method", ["divprune", "holov", "visionzip", "token_pooling"])
def test_what_is_attached_does_not_tell_what_is_prepared(family, method):
    inputs = make_inputs(family, TWO_IMAGES)
    groups = []
    for attached in (None, "vispruner", "visionzip", "uniform"):
        model = tiny_model(family)
        if attached is not None:
            attach(model, method=attached)
        prepared = restore_ext.prepare_inputs(model, **inputs, method=method, keep=9)
        groups.append([image.reduction.group for image in prepared.report.images])
    for other in groups[1:]:
        assert all(torch.equal(a, b) for a, b in zip(groups[0], other, strict=True))


@pytest.mark.parametrize("method", TOWER_METHODS)
def test_the_tower_is_attachs_or_the_prepared_prompts(method):
    inputs = make_inputs("llava", ONE_IMAGE)
    model = tiny_model("llava")
    restore_ext.attach(model, method=method, keep=16)
    want = logits(generate(model, inputs))
    for attached in ({"method": method, "keep": 25}, {"method": "vispruner"}, None):
        model = tiny_model("llava")
        if attached:
            attach(model, **attached)
        prepared = restore_ext.prepare_inputs(model, **inputs, method=method, keep=16)
        with prepared:
            assert_close(logits(generate_prepared(model, prepared)), want)
    model = tiny_model("llava")
    attach(model, method=method, keep=25)
    prepared = restore_ext.prepare_inputs(model, **inputs, method="uniform", keep=16)
    assert prepared.report.images[0].reduction.size.max() > 1  # of 64 tokens, not of 25
    assert prepared.report.images[0].reduction.kept.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_inputs_of_too_few_are_those_that_came(family):
    inputs = make_inputs(family, TWO_IMAGES)
    total = row_totals(family, inputs)[0]
    options = {"method": "uniform", "keep": 3}
    few = restore_ext.prepare_inputs(
        tiny_model(family), **inputs, **options, min_visual_tokens=total + 1
    )
    with few:
        assert few.report is None and few["input_ids"] is inputs["input_ids"]
        assert set(few) == set(inputs)
    enough = restore_ext.prepare_inputs(
        tiny_model(family), **inputs, **options, min_visual_tokens=total
    )
    assert enough.report is not None and "inputs_embeds" in enough._tensors


def test_a_model_is_not_switched_inside_a_block_that_prepared_its_inputs():
    model, inputs = tiny_model("llava"), make_inputs("llava", ONE_IMAGE)
    handle = restore_ext.attach(model, method="vispruner", keep=9)
    want = logits(generate(model, inputs))
    with restore_ext.prepare_inputs(model, **inputs, keep=4), pytest.raises(RuntimeError):
        handle.switch(handle.variant(keep=3))
    assert torch.equal(logits(generate(model, inputs)), want)


def generate_prepared(model, prepared):
    asked = {"max_new_tokens": 6, "do_sample": False}
    return model.generate(**prepared, **asked, return_dict_in_generate=True, output_logits=True)
