"""Cuts inside the language model of every family, against its own layers on dense biases."""

import pytest
from family_checks import (
    ROWS,
    TOLERANCE,
    WITH_FRAMES,
    assert_same_bits,
    dense,
    images_of,
    mixed_rows,
    model,
    row_inputs,
    said,
    scaled_shape,
)
from hf_harness import answers, assert_close, forward, generate, logits
from naive import Setting
from naive_stages import cuts_of, setting_of

import restore_ext
from restore_ext.testing.models import TINY, VIDEO, Picture, join_rows

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
ANEW = {
    "pyramiddrop": {"keep": 4, "options": {"layers": [2, 3]}},
    "sparsevlm": {"options": {"layers": [1, 3], "keeps": [9, 4]}},
}


def assert_is_dense(family: str, kind: str, rows: list):
    """A cached generate() of the rows as a batch has the logits of the reference, row by row; the
    handle."""
    backend = "mask" if kind in ("two cuts", "sparsevlm") else "op"
    asked = STAGED.get(kind) or {"method": kind, "restore": False, **ANEW[kind]}
    alone = row_inputs(family, rows)
    with restore_ext.attach(model(family), backend=backend, **asked) as handle:
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
    return handle


@each
@pytest.mark.parametrize("kind", STAGED)
def test_a_ragged_batch_of_several_images_is_the_reference(family, kind):
    assert_is_dense(family, kind, ROWS)


@pytest.mark.parametrize("family", ["gemma3", "aya_vision"])
@pytest.mark.parametrize("kind", ANEW)
def test_layers_of_several_ropes_count_positions_anew(family, kind):
    handle = assert_is_dense(family, kind, ROWS)
    assert handle.settings.positions == "reindex"


@pytest.mark.parametrize("family", WITH_FRAMES)
@pytest.mark.parametrize("kind", STAGED)
def test_images_and_frames_of_videos_are_cut_alike(family, kind):
    rows = mixed_rows(family)
    handle = assert_is_dense(family, kind, rows)
    ids = join_rows(row_inputs(family, rows))["input_ids"]
    left, valid = handle.last.source, handle.last.stages[-1].plan.valid
    visual, first = handle.last.layers[-1].visual, 0
    for row, parts in enumerate(rows):
        past = first + len(images_of(family, parts))
        said = ids[row, left[row, valid[row]]]
        assert (said >= VIDEO).sum() == sum(visual[first:past]) + newlines(family, parts)
        first = past
    assert first == len(visual) and (kind != "drop all" or not any(visual))


def newlines(family: str, row: tuple) -> int:
    """Those of the pictures and the videos of a row, which are text."""
    if family != "llava_onevision":
        return 0
    parts = [part for part in row if not isinstance(part, int)]
    return sum(scaled_shape(family, p)[0] if isinstance(p, Picture) else 1 for p in parts)


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


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", ["divprune", "visionzip", "tome"])
def test_a_chain_of_merges_conserves_sizes(family, restore, method):
    """All that goes in is there at last; what a method alone drops on the way in is not."""
    [inputs] = row_inputs(family, [(5, Picture(8, 8), 3, Picture(8, 8), 7)])
    schedule = {"layers": [9, 9, 6, 2], "merge": True, "scores": "lookahead"}
    asked = {"method": method, "keep": 9, "restore": restore, "positions": "original"}
    with restore_ext.attach(model(family), schedule=schedule, **asked) as handle:
        forward(model(family), inputs)
    first, *later = [handle.last.plan, *(stage.plan for stage in handle.last.stages)]
    sizes = [plan.size[plan.is_visual].sum() for plan in (first, *later)]
    tokens = sum(image.tokens_before for image in handle.last.images)
    assert len(later) == 2 and sizes == [sizes[0]] * 3
    assert sizes[0] == (tokens if restore or method != "divprune" else 18)


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
