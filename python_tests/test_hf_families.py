"""Every family of models, in the same corners: cached generation is the naive model's, nothing to
reduce is stock's bits.

The corners of the hook itself are tested on one model of RoPE and one of M-RoPE, in test_hf_*.py.
"""

from pathlib import Path

import pytest
import torch
import transformers
from family_cases import (
    CASES,
    PACKED,
    PRUNED,
    RATIO,
    each_case,
    one_by_one,
    pictures_of,
    rows_of,
)
from family_checks import scaled_shape
from hf_harness import (
    answers,
    assert_close,
    fingerprint,
    forward,
    generate,
    logits,
    naive,
    stock,
)
from naive import Setting, image_features

import restore_ext
from restore_ext.hf.families import FAMILIES, REFUSED, catalogue, find_family
from restore_ext.methods import METHODS, TOWER_METHODS
from restore_ext.methods.problem import FEATURES
from restore_ext.testing.models import (
    IMAGE,
    TEXT_ONLY,
    TINY,
    TWO_IMAGES,
    VERSION,
    Picture,
    join_rows,
    make_inputs,
    tiny_model,
)


def assert_is_naive(family: str, rows: list[dict], handle, out, **setting: bool) -> None:
    """Every row of an answer to the joined rows has the logits of the naive model."""
    how, plan = Setting(**setting), handle.last.plan
    length = max(row["input_ids"].shape[1] for row in rows)
    assert plan.assign.shape[1] == length
    assert plan.valid.shape[1] < length
    for number, row in enumerate(rows):
        tokens = answers(out, {"input_ids": plan.assign})[number]
        prompt = naive(family).reduced(naive(family).prompt(row), plan, number, how)
        assert len(prompt) < row["input_ids"].shape[1]
        want = naive(family).logits(prompt, tokens.tolist(), how)
        assert_close(logits(out)[number], want)


@each_case
def test_the_naive_model_is_the_stock_model(family):
    rows = one_by_one(family)
    out = generate(stock(family), join_rows(rows))
    for number, row in enumerate(rows):
        tokens = answers(out, join_rows(rows))[number].tolist()
        plain = Setting(**PRUNED)
        want = naive(family).logits(naive(family).prompt(row), tokens, plain)
        assert_close(logits(out)[number], want)


@each_case
@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({}, {"uniform_first": False}),
        ({"backend": "mask", "layer0": "uniform"}, {}),
        ({"restore": False}, {"reindex": True, **PRUNED}),
    ],
    ids=["restore", "mask", "plain"],
)
def test_cached_generation_of_ragged_rows_is_the_naive_model(family, options, setting):
    rows, model = one_by_one(family), tiny_model(family)
    if find_family(model).axes > 1:
        setting = {**setting, "reindex": False}
    with restore_ext.attach(model, keep_ratio=RATIO, **options) as handle:
        out = generate(model, join_rows(rows))
        assert_is_naive(family, rows, handle, out, **setting)
    for image in handle.last.images:
        assert image.tokens_after == max(1, round(RATIO * image.tokens_before))


@each_case
def test_two_images_of_a_prompt_have_their_own_budgets(family):
    rows, model = one_by_one(family, TWO_IMAGES), tiny_model(family)
    with restore_ext.attach(model, keep=[6, 2], layer0="uniform") as handle:
        out = generate(model, rows[0])
        assert_is_naive(family, rows, handle, out)
    assert [image.tokens_after for image in handle.last.images] == [6, 2]
    assert handle.last.images[0].start < handle.last.images[1].start


# Before 5.18 stock gives the beams of a row with several images the wrong ones.
BEAMS_MIX_IMAGES = VERSION < (5, 18)


@pytest.mark.parametrize(
    "family", [name for name in CASES if not (BEAMS_MIX_IMAGES and name.endswith("several"))]
)
def test_beams_of_a_batch_are_those_of_its_rows(family):
    """generate() repeats what was encoded, or the images themselves, each in its own way."""
    rows = [(5, Picture(8, 12), 7), (9, Picture(8, 8), 4)]
    rows = rows if BEAMS_MIX_IMAGES else rows_of(family)
    images = sum(map(count_images, rows))
    rows, model = one_by_one(family, rows), tiny_model(family)
    asked = {"num_beams": 2, "output_scores": True, "max_new_tokens": 3}
    with restore_ext.attach(model, keep_ratio=RATIO, method="vispruner") as handle:
        together = generate(model, join_rows(rows), **asked)
        assert len(handle.last.images) == 2 * images
        for number, row in enumerate(rows):
            alone = generate(model, row, **asked)
            length = row["input_ids"].shape[1]
            assert torch.equal(together.sequences[number, -3:], alone.sequences[0, length:])
            gap = together.sequences_scores[number] - alone.sequences_scores[0]
            assert gap.abs() <= 1e-5  # of logits of size 1


def count_images(row: tuple) -> int:
    return sum(isinstance(part, Picture) for part in row)


@each_case
def test_where_nothing_is_reduced_the_bits_are_stocks(family):
    model, inputs = tiny_model(family), join_rows(one_by_one(family))
    text = make_inputs(family, TEXT_ONLY)
    forward(model, inputs)  # transformers installs things of its own on the first one
    before, plain = fingerprint(model), generate(model, inputs)
    said = logits(plain), forward(model, inputs), forward(model, text)

    def assert_stock() -> None:
        assert torch.equal(logits(generate(model, inputs)), said[0])
        assert torch.equal(forward(model, inputs), said[1])
        assert torch.equal(forward(model, text), said[2])

    with restore_ext.attach(model, keep_ratio=RATIO, method="vispruner", enabled=False):
        assert_stock()
    with restore_ext.attach(model, keep=1000, method="vispruner") as handle:
        assert_stock()
        assert handle.last is None
    with restore_ext.attach(model, keep_ratio=RATIO):
        assert torch.equal(forward(model, text), said[2])
        assert not torch.equal(logits(generate(model, inputs)), said[0])
    assert_stock()
    assert fingerprint(model) == before


@each_case
@pytest.mark.parametrize("restore", [True, False])
def test_every_method_reduces_every_image_alone_as_reduce_tokens_does(family, restore):
    """Scores and tower features of one image must not be another's: those of a batch are those of
    its rows, and methods without them are reduce_tokens of the features."""
    rows, model = one_by_one(family), tiny_model(family)
    for name, method in METHODS.items():
        options = {"keep_ratio": 0.4, "method": name, "restore": restore, "seed": 3}
        with restore_ext.attach(model, positions="original", **options) as handle:
            forward(model, join_rows(rows))
            together = [image.reduction for image in handle.last.images]
            alone = []
            for row in rows:
                forward(model, row)
                alone += [image.reduction for image in handle.last.images]
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got.group, want.group), name
            assert torch.equal(got.size, want.size), name
            if restore or got.merged.any():
                assert got.size.sum() == got.group.shape[1]
        if method.needs_scores or method.metric != FEATURES:
            continue
        for got, features in zip(together, visual_features(family, rows), strict=True):
            want = restore_ext.reduce_tokens(features[None], **options)
            assert torch.equal(got.group, want.group), name
            assert_close(got.tokens, want.tokens)


def visual_features(family: str, rows: list[dict]) -> list[torch.Tensor]:
    """The features [N, C] of each image but newlines."""
    model, images = stock(family), []
    for row in rows:
        features = image_features(model, row)
        if family in PACKED:
            newline = model.model.image_newline
            features = [image[(image != newline).any(-1)] for image in features]
        if family in ("idefics3", "smolvlm"):
            features = torch.cat(features).split(16)
        images += features
    return images


@pytest.mark.parametrize("family", PACKED)
def test_newlines_are_text_kept_each_where_it_was(family):
    rows, model = one_by_one(family), tiny_model(family)
    inputs = join_rows(rows)
    with restore_ext.attach(model, keep=3) as handle:
        forward(model, inputs)
    plan, newline, found = handle.last.plan, model.model.image_newline, 0
    for number, row in enumerate(rows):
        features = torch.cat(image_features(stock(family), row))
        is_newline = (features == newline).all(-1)
        column = (inputs["input_ids"][number] == IMAGE).nonzero()[:, 0][is_newline]
        new = plan.assign[number, column]
        assert (new >= 0).all() and len(new.unique()) == len(new)
        assert torch.equal(plan.source[number, new], column)
        assert plan.size[number, new].eq(1).all() and plan.uniform[number, new].eq(1).all()
        assert not plan.is_visual[number, new].any()
        assert (plan.assign[number][:, None] == new).sum() == len(new)  # nothing joined them
        found += len(column)
    pictures = pictures_of(family)
    assert found == sum(newlines(family, picture) for picture in pictures)
    assert [image.tokens_after for image in handle.last.images] == [3] * len(pictures)


def newlines(family: str, picture: Picture) -> int:
    if family.endswith("several"):
        return 1
    return scaled_shape(family, picture)[0]


@each_case
def test_a_row_without_an_image_is_stock_beside_rows_that_are_reduced(family):
    rows, model = one_by_one(family, [*rows_of(family), (11,)]), tiny_model(family)
    if "pixel_attention_mask" in rows[0]:  # these count their images by rows
        for name in ("pixel_values", "pixel_attention_mask"):
            rows[2][name] = torch.zeros_like(rows[0][name][:, :1])
    text = {name: x for name, x in rows[2].items() if not name.startswith("pixel")}
    with restore_ext.attach(model, keep_ratio=RATIO, layer0="uniform") as handle:
        out = generate(model, join_rows(rows))
    assert [image.row for image in handle.last.images][-1] == 1
    assert_close(logits(out)[2], logits(generate(stock(family), text))[0])


ONE_GRID = ("llava", "pixtral", "paligemma", "paligemma2")  # a token of every patch of a picture


@pytest.mark.parametrize("method", sorted(TOWER_METHODS))
@pytest.mark.parametrize("family", [f for f in TINY if f not in ONE_GRID])
def test_methods_of_the_tower_are_refused_by_name_but_on_one_grid(family, method):
    model = tiny_model(family, attn="eager")
    before = fingerprint(model)
    with pytest.raises(NotImplementedError, match=method) as caught:
        restore_ext.attach(model, method=method, keep=5)
    assert find_family(model).name in str(caught.value)
    assert fingerprint(model) == before


def test_the_names_of_the_families_are_listed_once():
    names = restore_ext.list_families()
    assert names == [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert {find_family(stock(case)).name for case in CASES} <= set(names)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_hooked_is_refused_with_its_reason(name):
    cls = getattr(transformers, name)
    with pytest.raises(NotImplementedError, match=name) as caught:
        restore_ext.attach(cls.__new__(cls), keep=5)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", ["VipLlavaForConditionalGeneration", "LlamaForCausalLM"])
def test_any_other_class_is_refused_with_the_list_of_those_that_are_not(name):
    cls = getattr(transformers, name)
    with pytest.raises(TypeError, match=name) as caught:
        restore_ext.attach(cls.__new__(cls), keep=5)
    for family in FAMILIES:
        assert family.model_class in str(caught.value)


def test_the_page_of_the_families_is_what_the_adapters_say():
    page = Path(__file__).parent.parent / "docs" / "families.md"
    assert page.read_text() == catalogue.page() + "\n", "run: python -m bench.tables"
    for family in FAMILIES:
        assert f"| `{family.name}` | `{family.model_class}` | {family.models} |" in page.read_text()
