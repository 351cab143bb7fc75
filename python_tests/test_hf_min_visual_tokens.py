"""min_visual_tokens: a prompt with too few visual tokens is left as it is, in every way."""

import pytest
import torch
from family_checks import ROWS, TOLERANCE, dense, model, row_inputs, row_totals
from hf_harness import answers, assert_close, forward, generate, logits
from naive import Setting
from naive_stages import cuts_of, setting_of

import restore_ext
from restore_ext.testing.models import (
    FAMILIES,
    TEXT_ONLY,
    TINY,
    TWO_IMAGES,
    Picture,
    join_rows,
    make_inputs,
    tiny_model,
)

each = pytest.mark.parametrize("family", sorted({*TINY} - {"llava_onevision_several"}))
WAYS = {
    "way in": {"method": "uniform", "keep": 3},
    "shared": {"method": "uniform", "keep": 5, "budget": "shared"},
    "inside": {"method": "vtw", "options": {"layer": 3}},
    "both": {
        "method": "vispruner",
        "keep_ratio": 0.5,
        "schedule": {"method": "fastv", "keep": 3, "layer": 3, "merge": True},
    },
}
STAGES = {
    "fastv": {"keep": 3, "options": {"layer": 3}},
    "pyramiddrop": {"options": {"layers": [3], "ratios": [0.2]}},
    "sparsevlm": {"options": {"layers": [3], "keeps": [4]}},
    "vtw": {"options": {"layer": 3}},
    "adsc_style": {"options": {"layers": [3], "stride": 3, "offset": 1}},
    "schedule": {"options": {"layers": [1.0, 1.0, 1.0, 0.2], "merge": True}},
}


@each
def test_a_prompt_of_too_few_is_stock_to_the_bit(family):
    inputs = join_rows(row_inputs(family, ROWS))
    most = max(row_totals(family, inputs).values())
    want = forward(model(family), inputs)
    for way, options in WAYS.items():
        with restore_ext.attach(model(family), **options, min_visual_tokens=most + 1) as handle:
            assert torch.equal(forward(model(family), inputs), want), way
            assert handle.last is None
        with restore_ext.attach(model(family), **options, min_visual_tokens=most) as handle:
            forward(model(family), inputs)
            assert handle.last is not None, way


@each
@pytest.mark.parametrize("way", ["shared", "both"])
def test_of_a_ragged_batch_only_the_rows_of_too_few_are_spared(family, way):
    alone = row_inputs(family, ROWS)
    inputs = join_rows(alone)
    totals = row_totals(family, inputs)
    least = sorted(totals.values())[-1]
    with restore_ext.attach(model(family), **WAYS[way], min_visual_tokens=least) as handle:
        out = generate(model(family), inputs, max_new_tokens=2)
        spared = {row for row, total in totals.items() if total < least}
        assert 0 < len(spared) < len(ROWS)
        last = handle.last.layers[-1].visual
        for image, left in zip(handle.last.images, last, strict=True):
            whole = image.tokens_before == image.tokens_after == left
            assert whole == (image.row in spared)
        tokens = answers(out, inputs)
        for row, one in enumerate(alone):
            want = dense(family).logits(
                dense(family).prompt(one),
                handle.last.plan,
                row,
                tokens[row].tolist(),
                Setting(**setting_of(handle)),
                cuts_of(handle, row),
            )
            assert_close(logits(out)[row], want, TOLERANCE)
    for row in spared:
        stock = generate(model(family), alone[row], max_new_tokens=2)
        assert_close(logits(out)[row], logits(stock)[0], TOLERANCE)


@pytest.mark.parametrize("method", STAGES)
def test_every_cut_inside_spares_the_rows_of_too_few(method):
    family = "qwen2_5_vl"
    alone = row_inputs(family, [(5, Picture(8, 12), 7), (4, Picture(8, 8), Picture(6, 8), 3)])
    inputs = join_rows(alone)  # 24 tokens, and 16 and 12
    options = {"method": method, **STAGES[method]}
    with restore_ext.attach(model(family), **options, min_visual_tokens=25) as handle:
        got = logits(generate(model(family), inputs, max_new_tokens=2))
        (stage,) = handle.last.stages
        assert stage.tokens_before == [24, 16, 12] and stage.tokens_after[0] == 24
        assert stage.tokens_after[1] < 16 and stage.tokens_after[2] < 12
    stock = logits(generate(model(family), alone[0], max_new_tokens=2))
    assert_close(got[0], stock[0], TOLERANCE)
    with restore_ext.attach(model(family), **options):
        cut = logits(generate(model(family), alone[1], max_new_tokens=2))
    assert_close(got[1], cut[0], TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_counted_as_their_row_is(family):
    inputs = make_inputs(family, TWO_IMAGES)
    total = row_totals(family, inputs)[0]
    for least, reduced in ((total, True), (total + 1, False)):
        with restore_ext.attach(
            model(family), method="uniform", keep=3, min_visual_tokens=least
        ) as handle:
            generate(model(family), inputs, num_beams=2, max_new_tokens=2)
            assert (handle.last is not None) == reduced


@pytest.mark.parametrize("method", ["tome_vit", "downsample"])
def test_a_tower_spares_pictures(method):
    """Two of 64 tokens in a prompt: too few each, though not together."""
    inputs = make_inputs("llava", TWO_IMAGES)
    llava = tiny_model("llava")
    want = forward(llava, inputs)
    for inside in (None, {"method": "vtw"}):
        options = {"method": method, "keep": 20, "schedule": inside}
        with restore_ext.attach(llava, **options, min_visual_tokens=65) as handle:
            assert torch.equal(forward(llava, inputs), want) and handle.last is None
        with restore_ext.attach(llava, **options, min_visual_tokens=64) as handle:
            forward(llava, inputs)
            assert handle.last is not None
    # A budget that the blocks cannot get down to is nothing to refuse where none is wanted.
    restore_ext.attach(llava, method="tome_vit", keep=3, min_visual_tokens=65).detach()
    with pytest.raises(ValueError, match="keep must be at least"):
        restore_ext.attach(llava, method="tome_vit", keep=3, min_visual_tokens=64)


def test_text_alone_stays_text_alone():
    inputs = make_inputs("llava", TEXT_ONLY)
    want = forward(model("llava"), inputs)
    with restore_ext.attach(model("llava"), method="uniform", keep=3, min_visual_tokens=9):
        assert torch.equal(forward(model("llava"), inputs), want)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (-1, ValueError, "min_visual_tokens must be an int >= 0, got -1"),
        (2.5, TypeError, "min_visual_tokens must be an int, got 2.5"),
        (True, TypeError, "min_visual_tokens must be an int, got True"),
        (None, TypeError, "min_visual_tokens must be an int, got None"),
    ],
)
def test_says_what_is_wrong_and_attaches_nothing(given, error, message):
    with pytest.raises(error, match=message):
        restore_ext.attach(model("llava"), keep=3, min_visual_tokens=given)
    assert not hasattr(model("llava"), "_restore_ext_handle")
