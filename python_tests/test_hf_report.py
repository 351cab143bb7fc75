"""handle.last says what was done: counts, groups, positions, bytes."""

import pytest
import torch
from hf_harness import attach, each_backend, each_family, forward, generate, stock
from naive import image_features

from restore_ext.methods import METHODS
from restore_ext.testing.models import (
    ADJACENT_IMAGES,
    IMAGE,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    image_tokens,
    make_inputs,
    tiny_model,
)

each_batch = pytest.mark.parametrize("rows", [ONE_IMAGE, TWO_IMAGES, ADJACENT_IMAGES, RAGGED])


def reported(family: str, rows: list, **options):
    model, inputs = tiny_model(family), make_inputs(family, rows)
    handle = attach(model, **options)
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    return inputs, past, handle.last


def starts(inputs: dict) -> list[tuple[int, int]]:
    """(row, first column) of every image, counting its tokens off."""
    left = image_tokens(inputs)
    found = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        columns = [column for column, token in enumerate(ids) if token == IMAGE]
        while columns:
            found.append((row, columns[0]))
            columns = columns[left.pop(0) :]
    return found


@each_family
@each_batch
def test_every_image_is_there_with_its_place_and_its_counts(family, rows):
    inputs, _, report = reported(family, rows, keep_ratio=0.3)
    counts = image_tokens(inputs)
    assert [image.tokens_before for image in report.images] == counts
    assert [image.tokens_after for image in report.images] == [round(0.3 * n) for n in counts]
    assert [(image.row, image.start) for image in report.images] == starts(inputs)
    for image in report.images:
        assert image.reduction.group.shape == (1, image.tokens_before)
        assert image.reduction.tokens.shape[1] == image.tokens_after


@each_family
@each_batch
def test_the_plan_is_the_reductions_laid_into_the_sequence(family, rows):
    """Written out again token by token: text stays, images are their groups, rows end together."""
    inputs, _, report = reported(family, rows)
    plan, mask = report.plan, inputs["attention_mask"].bool()
    B, S = mask.shape
    T = plan.valid.shape[1]
    for row in range(B):
        new_of, source, size, uniform = {}, [], [], []
        images = [image for image in report.images if image.row == row]
        column = 0
        while column < S:
            image = next((i for i in images if i.start == column), None)
            if not mask[row, column]:
                column += 1
            elif image is None:
                new_of[column] = len(source)
                source.append(column)
                size.append(1.0)
                uniform.append(1.0)
                column += 1
            else:
                reduction, before = image.reduction, image.tokens_before
                for offset, group in enumerate(reduction.group[0].tolist()):
                    new_of[column + offset] = len(source) + group
                size += reduction.size[0].tolist()
                uniform += [before / image.tokens_after] * image.tokens_after
                source += (reduction.position[0] + column).tolist()
                column += before
        pad = T - len(source)
        assign = [new_of[c] + pad if c in new_of else -1 for c in range(S)]
        assert plan.assign[row].tolist() == assign
        assert plan.valid[row].tolist() == [False] * pad + [True] * len(source)
        assert plan.source[row, pad:].tolist() == source
        assert plan.size[row, pad:].tolist() == size
        assert plan.uniform[row, pad:].tolist() == pytest.approx(uniform)
        assert plan.is_visual[row, pad:].tolist() == [
            bool(inputs["input_ids"][row, c] == IMAGE) for c in source
        ]
        assert not plan.is_visual[row, :pad].any()
    assert plan.valid.all(0).any() and plan.valid[:, -1].all()


@each_family
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_merged_token_stands_at_the_lower_median_of_its_sources(family, method):
    _, _, report = reported(family, TWO_IMAGES, method=method)
    plan = report.plan
    for column in plan.is_visual[0].nonzero().flatten().tolist():
        members = (plan.assign[0] == column).nonzero().flatten().tolist()
        assert plan.source[0, column] == sorted(members)[(len(members) - 1) // 2]
    source = plan.source[0][plan.valid[0]]
    assert torch.equal(source, source.sort().values) and len(source.unique()) == len(source)


@each_family
@each_batch
@pytest.mark.parametrize("method", sorted(METHODS))
def test_restore_loses_no_token_and_pruning_gives_none_a_second(family, rows, method):
    inputs, _, report = reported(family, rows, method=method)
    visual = (inputs["input_ids"] == IMAGE).sum(1)
    size = torch.where(report.plan.is_visual, report.plan.size, 0)
    assert torch.equal(size.sum(1).long(), visual)
    if not METHODS[method].merges(False):
        options = {"restore": False, "positions": "original", "method": method}
        inputs, _, report = reported(family, rows, **options)
        assert report.plan.size[report.plan.valid].eq(1).all()


@each_family
@each_backend
@each_batch
def test_layers_and_bytes_are_those_of_the_cache_itself(family, backend, rows):
    inputs, past, report = reported(family, rows, backend=backend)
    S, T = inputs["input_ids"].shape[1], report.plan.valid.shape[1]
    assert len(report.layers) == len(past.layers) == 4
    for layer, kept in zip(report.layers, past.layers, strict=True):
        assert kept.keys.shape[2] == T
        assert layer.tokens_before == S and layer.tokens_after == T
        assert layer.kv_bytes == kept.keys.nbytes + kept.values.nbytes
    assert report.kv_bytes == sum(layer.kv_bytes for layer in report.layers)
    with torch.no_grad():
        whole = stock(family)(**inputs, use_cache=True).past_key_values
    assert report.kv_bytes_stock == sum(k.keys.nbytes + k.values.nbytes for k in whole.layers)
    assert report.kv_bytes < report.kv_bytes_stock


@each_family
@each_backend
def test_bytes_follow_the_dtype(family, backend):
    model, inputs = tiny_model(family).to(torch.bfloat16), make_inputs(family)
    handle = attach(model, backend=backend)
    forward(model, inputs)
    half = handle.last.kv_bytes
    handle = attach(model.float(), backend=backend)
    forward(model, inputs)
    assert handle.last.kv_bytes == 2 * half


@each_family
@each_backend
def test_decoding_and_text_do_not_rewrite_the_report(family, backend):
    model, inputs = tiny_model(family), make_inputs(family)
    handle = attach(model, backend=backend)
    forward(model, inputs)
    prefill = handle.last
    generate(model, inputs)
    for name in ("assign", "source", "valid", "is_visual", "size", "uniform"):
        assert torch.equal(getattr(handle.last.plan, name), getattr(prefill.plan, name))
    assert handle.last.kv_bytes == prefill.kv_bytes
    generate(model, make_inputs(family, TEXT_ONLY))
    assert handle.last.images[0].tokens_before == image_tokens(inputs)[0]


@each_family
def test_text_and_separators_are_neither_dropped_nor_counted(family):
    inputs, _, report = reported(family, TWO_IMAGES, keep=5)
    text = (inputs["input_ids"][0] != IMAGE).nonzero().flatten()
    columns = report.plan.assign[0, text]
    assert columns.min() >= 0 and len(columns.unique()) == len(text)
    assert torch.equal(report.plan.source[0, columns], text)
    assert report.plan.is_visual.sum() == 10
    assert report.plan.size[0, columns].eq(1).all()


@each_family
def test_the_reductions_tokens_are_the_means_of_the_features(family):
    inputs, _, report = reported(family, TWO_IMAGES)
    for image, features in zip(report.images, image_features(stock(family), inputs), strict=True):
        for token, group in enumerate(image.reduction.tokens[0]):
            mean = features[image.reduction.group[0] == token].mean(0)
            assert torch.allclose(group, mean, rtol=0, atol=1e-5)


@each_family
@each_backend
def test_a_direct_forward_gives_one_row_of_logits_per_token_left(family, backend):
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    shape = tuple(handle.last.plan.valid.shape)
    assert tuple(out.logits.shape[:2]) == shape
    assert [tuple(h.shape[:2]) for h in out.hidden_states] == [shape] * 5
    assert shape[1] < inputs["input_ids"].shape[1]
