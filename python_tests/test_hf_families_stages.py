"""Cuts inside the language model of every family, against its own layers on dense biases."""

import pytest
from family_checks import ROWS, TOLERANCE, assert_same_bits, dense, model, row_inputs, said
from hf_harness import answers, assert_close, generate, logits
from naive import Setting
from naive_stages import cuts_of, setting_of

import restore_ext
from restore_ext.testing.models import TINY, join_rows

each = pytest.mark.parametrize("family", sorted({*TINY} - {"llava_onevision_several"}))
STAGED = {
    "one cut": {"method": "fastv", "keep": 5, "options": {"layer": 3}},
    "two cuts": {"schedule": {"layers": [1.0, 1.0, 0.5, 0.2], "scores": "lookahead"}},
    "merges": {
        "method": "vispruner",
        "keep_ratio": 0.5,
        "schedule": {"method": "fastv", "keep": 3, "layer": 3, "merge": True},
    },
    "drop all": {"method": "vtw", "options": {"layer": 3}},
}


@each
@pytest.mark.parametrize("kind", STAGED)
def test_a_ragged_batch_of_several_images_is_the_reference(family, kind):
    backend = "mask" if kind == "two cuts" else "op"
    alone = row_inputs(family, ROWS)
    with restore_ext.attach(model(family), backend=backend, **STAGED[kind]) as handle:
        out = generate(model(family), join_rows(alone), max_new_tokens=2)
    tokens = answers(out, join_rows(alone))
    for row, inputs in enumerate(alone):
        want = dense(family).logits(
            dense(family).prompt(inputs),
            handle.last.plan,
            row,
            tokens[row].tolist(),
            Setting(**setting_of(handle)),
            cuts_of(handle, row),
        )
        assert_close(logits(out)[row], want, TOLERANCE)
    assert len(handle.last.stages) == len(handle.settings.stages)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_newline_behind_the_image_rates_in_no_batch(family):
    """A row with little text is rated by that text, however much the others have."""
    alone = row_inputs(family, ROWS)
    schedule = {"layers": [1.0, 1.0, 0.3, 0.3], "scores": "raters"}
    with restore_ext.attach(model(family), schedule=schedule) as handle:
        together = logits(generate(model(family), join_rows(alone), max_new_tokens=2))
        for row, inputs in enumerate(alone):
            by_itself = logits(generate(model(family), inputs, max_new_tokens=2))
            assert_close(together[row], by_itself[0], TOLERANCE)
            assert handle.last.stages


@each
def test_off_and_detached_are_the_same_bits(family):
    inputs = join_rows(row_inputs(family, ROWS))
    want = said(family, inputs)
    with restore_ext.attach(model(family), **STAGED["drop all"], enabled=False):
        assert_same_bits(family, inputs, want)
    assert_same_bits(family, inputs, want)


def test_deepstack_comes_before_the_first_cut():
    depth = len(model("qwen3_vl").model.visual.deepstack_visual_indexes)
    with pytest.raises(ValueError, match=f"qwen3_vl can be cut from layer {depth} on, got layer 1"):
        restore_ext.attach(model("qwen3_vl"), method="vtw", options={"layer": 1})
