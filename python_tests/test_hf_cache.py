"""The reduced cache: later turns on it, what searches do to it, and doing without one."""

import copy

import pytest
import torch
from hf_harness import (
    NEW,
    answers,
    assert_close,
    attach,
    each_backend,
    each_family,
    expected,
    forward,
    generate,
    logits,
    naive,
    reduced_row,
    step,
    stock,
)
from naive import Setting, image_features

from restore_ext.testing.models import (
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    Picture,
    make_inputs,
    tiny_model,
)


@each_family
@each_backend
@pytest.mark.parametrize("far", [False, True])
def test_the_rows_of_a_reduced_cache_can_be_repeated_reordered_and_chosen(family, backend, far):
    """What searches do to a cache: sizes, padding and positions must go with their keys."""
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    handle = attach(model, backend=backend, decode_distance=far)
    setting = Setting(decode_distance=far)
    logical = inputs["input_ids"].shape[1]
    if family == "llava":  # as generate() numbers a padded row
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    past.batch_repeat_interleave(2)
    past.reorder_cache(torch.tensor([3, 0, 2, 1]))
    past.batch_select_indices(torch.tensor([0, 1, 3]))
    rows, tokens = [1, 0, 0], torch.tensor([[17], [40], [99]])
    prompts = [reduced_row(family, inputs, handle, row, setting) for row in rows]
    ends = torch.tensor([prompt.following for prompt in prompts])[:, None]
    place = ends.expand(naive(family).axes(), 3, 1) if naive(family).axes() == 3 else ends
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(3, 1, dtype=torch.long)], 1)
    out = step(model, tokens, past, logical, position_ids=place, attention_mask=mask)
    for prompt, token, got in zip(prompts, tokens, out.logits[:, -1], strict=True):
        want = naive(family).logits(prompt, [int(token), 0], setting)[-1]
        assert_close(got, want)


@each_family
@each_backend
def test_a_cache_that_was_reset_starts_anew(family, backend):
    inputs, text = make_inputs(family), make_inputs(family, TEXT_ONLY)
    model = tiny_model(family)
    attach(model, backend=backend)
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        past = first.past_key_values
        past.reset()
        assert past.get_seq_length() == 0
        again = model(**inputs, past_key_values=past, use_cache=True)
        assert torch.equal(again.logits, first.logits)
        past.reset()
        after = model(**text, past_key_values=past, use_cache=True).logits
    assert_close(after, forward(stock(family), text))


@each_family
@each_backend
def test_switched_off_in_a_conversation_the_reduced_cache_still_answers(family, backend):
    """enabled=False is for new prompts: keys that were merged keep their sizes."""
    inputs = make_inputs(family)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    logical = inputs["input_ids"].shape[1]
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    handle.enabled = False
    out = step(model, torch.tensor([[7, 8, 9]]), past, logical)
    want = expected(family, inputs, handle, torch.tensor([7, 8, 9, 0]))
    assert_close(out.logits[0], want[1:])


@each_family
@each_backend
def test_a_second_turn_of_text_reuses_the_reduced_cache(family, backend):
    inputs = make_inputs(family)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    first = generate(model, inputs)
    prompt = reduced_row(family, inputs, handle, 0, Setting())
    question = torch.tensor([[11, 12, 13, 14]])
    ids = torch.cat([first.sequences, question], 1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        rest = kinds.new_zeros(1, ids.shape[1] - kinds.shape[1])
        second["mm_token_type_ids"] = torch.cat([kinds, rest], 1)
    past = copy.deepcopy(first.past_key_values)
    out = generate(model, second, past_key_values=past)
    told = torch.cat([answers(first, inputs)[0], question[0], answers(out, second)[0]])
    want = naive(family).logits(prompt, told.tolist(), Setting())
    assert_close(logits(out)[0], want[-NEW:])


@each_family
@each_backend
def test_a_second_turn_with_a_new_image_reduces_that_one_too(family, backend):
    """The new rows see the distance to the old keys; the answer between the turns saw none."""
    inputs = make_inputs(family)
    later = make_inputs(family, [(2, Picture(8, 8), 3)], seed=1)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    prompt = reduced_row(family, inputs, handle, 0, Setting())
    logical = inputs["input_ids"].shape[1]
    answer = [31, 32, 33]
    for t, token in enumerate(answer):
        past = step(model, torch.tensor([[token]]), past, logical + t).past_key_values
    told = naive(family).text(torch.tensor(answer), prompt.following)
    features = image_features(stock(family), later)
    full = naive(family).prompt(later, features, start=told.following)
    options = {n: v for n, v in later.items() if n not in ("input_ids", "attention_mask")}
    options["position_ids"] = full.position[:, None] if len(full.position) == 3 else full.position
    out = step(model, later["input_ids"], past, logical + len(answer), **options)
    new = naive(family).reduced(full, handle.last.plan, 0, Setting())
    assert len(new) < len(full)
    want = naive(family).forward(prompt.then(told).then(new), Setting())
    assert_close(out.logits[0], want[-len(new) :])
    seven = naive(family).text(torch.tensor([7]), new.following)
    place = seven.position[:, None] if len(full.position) == 3 else seven.position
    logical += len(answer) + len(full)
    after = step(model, torch.tensor([[7]]), out.past_key_values, logical, position_ids=place)
    every = prompt.then(told).then(new).then(seven)
    assert_close(after.logits[0, -1], naive(family).forward(every, Setting())[-1])


@each_backend
@pytest.mark.parametrize(
    ("family", "first", "keep"),
    [
        ("llava", TEXT_ONLY, None),
        ("qwen2_5_vl", TEXT_ONLY, None),
        ("llava", ONE_IMAGE, [64]),
    ],
)
def test_a_later_turn_is_reduced_on_a_cache_that_stock_has_filled(family, first, keep, backend):
    """What was cached before anything was reduced has size 1, and a distance."""
    inputs, later = make_inputs(family, first), make_inputs(family, seed=1)
    model = tiny_model(family)
    handle = attach(model, backend=backend, **({"keep": keep} if keep else {}))
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    assert handle.last is None
    if keep:
        handle = attach(model, backend=backend)
    told, logical = naive(family).prompt(inputs), inputs["input_ids"].shape[1]
    features = image_features(stock(family), later)
    full = naive(family).prompt(later, features, start=told.following)
    options = {n: v for n, v in later.items() if n not in ("input_ids", "attention_mask")}
    options["position_ids"] = full.position[:, None] if len(full.position) == 3 else full.position
    out = step(model, later["input_ids"], past, logical, **options)
    new = naive(family).reduced(full, handle.last.plan, 0, Setting())
    want = naive(family).forward(told.then(new), Setting())
    assert_close(out.logits[0], want[-len(new) :])


@each_family
@each_backend
def test_a_forward_without_cache_says_what_one_with_a_cache_says(family, backend):
    inputs = make_inputs(family, TWO_IMAGES)
    model = tiny_model(family)
    attach(model, backend=backend)
    with_cache = forward(model, inputs, use_cache=True)
    assert torch.equal(forward(model, inputs, use_cache=False), with_cache)


@each_family
@each_backend
@pytest.mark.parametrize("calibrate", ["size", "none"])
def test_generating_without_a_cache_equals_generating_with_one(family, backend, calibrate):
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    attach(model, backend=backend, calibrate=calibrate)
    with_cache = generate(model, inputs)
    assert_close(logits(generate(model, inputs, use_cache=False)), logits(with_cache))


@each_family
@each_backend
def test_without_a_cache_every_token_is_prefill_and_sees_the_distance(family, backend):
    inputs = make_inputs(family)
    model = tiny_model(family)
    attach(model, backend=backend)
    redone = generate(model, inputs, use_cache=False)
    attach(model, backend=backend, decode_distance=True)
    assert_close(logits(redone), logits(generate(model, inputs)))
