"""Videos: each frame is an image, among the images of a prompt and in its order."""

import pytest
import torch
from family_checks import (
    TOLERANCE,
    VIDEOS,
    WITH_FRAMES,
    assert_generates_dense,
    assert_same_bits,
    images_of,
    mixed_rows,
    model,
    row_inputs,
    said,
)
from hf_harness import (
    RATIO,
    assert_close,
    attach,
    each_backend,
    fingerprint,
    forward,
    generate,
    logits,
)
from test_hf_families_scores import blocks, tower_attention

import restore_ext
from restore_ext.hf import images
from restore_ext.hf.compat import GENERATE_CARRIES_POSITIONS
from restore_ext.hf.diagnosis.maps import find_bases
from restore_ext.hf.families import find_family
from restore_ext.hf.report import VisualTokens
from restore_ext.hf.settings import split_budget
from restore_ext.hf.vision import IMAGE, VIDEO
from restore_ext.methods import METHODS, Method
from restore_ext.methods.problem import KEYS, RECEIVED, TOWER_FEATURES
from restore_ext.testing.models import VERSION, Picture, Video, join_rows, make_inputs, tiny_model
from restore_ext.testing.zoo.llava_next import TILE

each = pytest.mark.parametrize("family", WITH_FRAMES)


def expected_images(family: str) -> list[tuple[int, int, bool]]:
    """Row, tokens, and whether it is a frame of a video, of every image of mixed_rows()."""
    found = [
        (row, tokens, is_frame and family != "internvl")
        for row, parts in enumerate(mixed_rows(family))
        for tokens, is_frame in images_of(family, parts)
    ]
    assert len(found) > len(mixed_rows(family))
    return found


@each
@each_backend
def test_images_and_frames_of_ragged_rows_are_the_reference(family, backend):
    """A cached generate(), and a forward that encodes in itself."""
    with attach(model(family), backend=backend) as handle:
        inputs = assert_generates_dense(family, handle, mixed_rows(family))
        with torch.no_grad():
            whole = model(family)(**inputs).logits[:, -1]
        assert_close(whole, logits(generate(model(family), inputs))[:, 0], TOLERANCE)
    report, adapter = handle.last, find_family(model(family))
    seen = [(image.row, image.tokens_before, image.is_frame) for image in report.images]
    assert seen == expected_images(family)
    for image in report.images:
        assert image.tokens_after == max(1, round(RATIO * image.tokens_before))
        kind = VIDEO if image.is_frame else IMAGE
        assert inputs["input_ids"][image.row, image.start] == adapter.token(kind)
    tokens = VisualTokens.count(inputs["input_ids"], model(family).config, report)
    gone = sum(image.tokens_before - image.tokens_after for image in report.images)
    placeholders = {adapter.token(kind) for kind in adapter.kinds}
    assert tokens.prompt == sum((inputs["input_ids"] == token).sum() for token in placeholders)
    assert tokens.prompt - tokens.first_layer == gone > 0
    assert report.plan.is_visual.sum() == sum(image.tokens_after for image in report.images)


def test_placeholders_may_come_as_embeddings():
    family = "llava_onevision"
    inputs = join_rows(row_inputs(family, mixed_rows(family)))
    with attach(model(family)):
        want = forward(model(family), inputs)
        embeds = model(family).get_input_embeddings()(inputs.pop("input_ids"))
        assert_close(forward(model(family), {**inputs, "inputs_embeds": embeds}), want)


@pytest.mark.parametrize("family", [name for name in WITH_FRAMES if name != "llava_onevision"])
def test_a_frame_is_reduced_as_a_picture_of_its_pixels(family):
    """By every method: nothing of a frame is scored by, or compared with, another."""
    frames = 3
    video = make_inputs(family, [(5, Video(frames, 6, 8), 4)])
    apart = make_inputs(family, [(5, *[Picture(6, 8), 1] * frames, 4)])
    apart["pixel_values"] = video.get("pixel_values_videos", video.get("pixel_values"))
    for name in METHODS:
        with attach(model(family), method=name, keep_ratio=0.4, seed=3) as handle:
            forward(model(family), video)
            got = [image.reduction for image in handle.last.images]
            forward(model(family), apart)
            want = [image.reduction for image in handle.last.images]
        assert len(got) == frames
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.group, other.group), name
            assert_close(one.tokens, other.tokens)


@pytest.mark.parametrize("metric", [KEYS, TOWER_FEATURES])
def test_what_methods_are_told_of_onevisions_frames_is_pooled_as_the_features_are(
    monkeypatch, metric
):
    """Means of 2 x 2 patches: of the attention received in the layer of the features, and of keys,
    or of what is projected. Beside images, which are packed instead."""
    family, told = "llava_onevision", []

    def first_tokens(problem, budget):
        told.extend(zip(problem.scores, problem.metric, strict=True))
        return torch.arange(budget).expand(len(problem.scores), budget)

    monkeypatch.setitem(METHODS, "spy", Method(first_tokens, scores=RECEIVED, metric=metric))
    rows = [(5, Picture(8, 8), 2, Video(3), 7), (4, Video(3), 6)]
    inputs = join_rows(row_inputs(family, rows))
    with restore_ext.attach(model(family), method="spy", keep=2) as handle:
        forward(model(family), inputs)
    is_frame = [image.is_frame for image in handle.last.images]
    assert is_frame == [False] + [True] * 6
    frames = [pair for pair, frame in zip(told, is_frame, strict=True) if frame]

    alone = {**inputs, "input_ids": inputs["input_ids"].clone()}
    token = model(family).config.image_token_id
    alone["input_ids"][alone["input_ids"] == token] = 5
    for name in ("pixel_values", "image_sizes"):
        del alone[name]
    weights, keys = tower_attention(monkeypatch, family, alone)
    vectors = keys.mean(1)
    if metric == TOWER_FEATURES:
        pixels = inputs["pixel_values_videos"].flatten(0, 1)
        with torch.no_grad():
            tower = tiny_model(family).model.vision_tower
            vectors = tower(pixels, output_hidden_states=True).hidden_states[-1]
    for (scores, seen), share, vector in zip(frames, weights.mean((1, 2)), vectors, strict=True):
        want = blocks(share.view(TILE, TILE), 2)
        assert scores.allclose(want, rtol=1e-4, atol=1e-7)
        assert want.std() > 0.01 * want.mean()
        pooled = [blocks(channel.view(TILE, TILE), 2) for channel in vector.unbind(-1)]
        assert_close(seen, torch.stack(pooled, -1))


@pytest.mark.parametrize("family", VIDEOS)
def test_frames_have_budgets_of_their_own_or_share_one(family):
    rows = mixed_rows(family)
    inputs = join_rows(row_inputs(family, rows))
    found = expected_images(family)
    each_its_own = [2 + i % 2 for i in range(len(found))]
    with attach(model(family), keep=each_its_own) as handle:
        assert_generates_dense(family, handle, rows)
        kept = [image.tokens_after for image in handle.last.images]
    assert kept == [min(n, keep) for keep, (_, n, _) in zip(each_its_own, found, strict=True)]
    with attach(model(family), keep=9, budget="shared", method="uniform") as handle:
        forward(model(family), inputs)
        kept = [image.tokens_after for image in handle.last.images]
    want = [split_budget(9, [n for n, _ in images_of(family, row)]) for row in rows]
    assert kept == [share for of_row in want for share in of_row]
    wrong = f"one per image, {len(found)} images, got 3; a frame"
    with attach(model(family), keep=[3, 4, 5]), pytest.raises(ValueError, match=wrong):
        forward(model(family), inputs)


@pytest.mark.parametrize("family", VIDEOS)
def test_where_no_frame_is_reduced_the_bits_are_stocks(family):
    inputs = join_rows(row_inputs(family, mixed_rows(family)))
    want, before = said(family, inputs), fingerprint(model(family))
    with attach(model(family), method="vispruner", enabled=False):
        assert_same_bits(family, inputs, want)
    with attach(model(family), method="vispruner", keep=1000) as handle:
        assert_same_bits(family, inputs, want)
        assert handle.last is None
    with attach(model(family), min_visual_tokens=1000) as handle:
        assert_same_bits(family, inputs, want)
    assert_same_bits(family, inputs, want)
    assert fingerprint(model(family)) == before


# Two videos of as many tokens, of other frames: beams must not mix them up. Stock's own beams fail
# on GLM-4V's videos from 5.18 on, and on Qwen3-VL's before 5.0.
BEAMS = [(5, Picture(8, 8), 2, Video(2, 4, 6), 7), (9, Video(3, 4, 4), 1, Picture(8, 12), 4)]


@pytest.mark.parametrize(
    "family", ["llava_onevision", "qwen2_vl", *(["qwen3_vl"] if VERSION >= (5, 0) else [])]
)
def test_beams_of_a_batch_are_those_of_its_rows(family):
    rows = BEAMS if family != "llava_onevision" else [BEAMS[0], (9, Video(2), Picture(8, 12), 4)]
    alone, found = row_inputs(family, rows), [images_of(family, row) for row in rows]
    asked = {"num_beams": 2, "output_scores": True, "max_new_tokens": 3}
    with attach(model(family), method="vispruner") as handle:
        together = generate(model(family), join_rows(alone), **asked)
        before = [(image.tokens_before, image.is_frame) for image in handle.last.images]
        assert before == [image for of_row in found for image in of_row * 2]
        for number, row in enumerate(alone):
            by_itself = generate(model(family), row, **asked)
            length = row["input_ids"].shape[1]
            assert torch.equal(together.sequences[number, -3:], by_itself.sequences[0, length:])
            gap = together.sequences_scores[number] - by_itself.sequences_scores[0]
            assert gap.abs() <= 1e-4


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_without_a_cache_frames_are_reduced_once_and_the_same_is_said(monkeypatch, family):
    inputs, calls = join_rows(row_inputs(family, mixed_rows(family))), []
    real = images.reduce_tokens

    def counted(*args, **kwargs):
        calls.append(kwargs["keep"])
        return real(*args, **kwargs)

    monkeypatch.setattr(images, "reduce_tokens", counted)
    with attach(model(family), calibrate="size", method="vispruner"):
        cached = generate(model(family), inputs, max_new_tokens=3)
        once = len(calls)
        without = generate(model(family), inputs, max_new_tokens=3, use_cache=False)
    assert torch.equal(cached.sequences, without.sequences)
    assert_close(logits(without), logits(cached), TOLERANCE)
    if VERSION >= (5, 18):  # before, every step encodes them anew
        assert len(calls) == 2 * once > 0


if GENERATE_CARRIES_POSITIONS:

    @pytest.mark.parametrize("family", [name for name in VIDEOS if name != "qwen3_vl"])
    @each_backend
    def test_prepared_inputs_say_what_an_attached_model_says(family, backend):
        inputs = join_rows(row_inputs(family, mixed_rows(family)))
        how = {"keep_ratio": RATIO, "method": "vispruner", "backend": backend}
        with restore_ext.attach(model(family), **how) as handle:
            want = generate(model(family), inputs)
        prepared = restore_ext.prepare_inputs(model(family), **inputs, **how)
        with prepared:
            got = generate(model(family), dict(prepared), cache_implementation="static")
        assert torch.equal(got.sequences, want.sequences)
        assert_close(logits(got), logits(want), TOLERANCE)
        assert prepared.report.images[-1].is_frame == handle.last.images[-1].is_frame is True


@pytest.mark.parametrize("family", VIDEOS)
def test_chunks_are_refused_where_a_frame_is_reduced(family):
    inputs = make_inputs(family, [mixed_rows(family)[0]])
    with attach(model(family)), pytest.raises(NotImplementedError, match=r"prefill_chunk_size.*20"):
        generate(model(family), inputs, prefill_chunk_size=20)


def test_glm4v_images_and_videos_are_no_batch():
    """Their placeholders are the same: the model itself cannot say which are whose."""
    inputs = make_inputs("glm4v", [(5, Video(2, 4, 6), 3, Picture(4, 6), 4)])
    with attach(model("glm4v")), pytest.raises(NotImplementedError, match=r"glm4v.*placeholder"):
        forward(model("glm4v"), inputs)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_a_diagnosis_counts_frames_as_images(family):
    inputs = make_inputs(family, mixed_rows(family))
    found = restore_ext.diagnose(
        model(family), inputs, new_tokens=1, method="uniform", keep_ratio=RATIO
    )
    assert [(image.row, len(image.index)) for image in found.images] == [
        (row, tokens) for row, tokens, _ in expected_images(family)
    ]
    reasons = {base.reason for base in find_bases(model(family), inputs, [1] * len(found.images))}
    assert len(reasons) == 1 and "video" in reasons.pop()
