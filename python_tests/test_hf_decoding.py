"""Ways to decode other than plain greedy generate(): each must be the naive model too."""

import copy

import pytest
import torch
from hf_harness import (
    NEW,
    answers,
    assert_close,
    assert_is_naive,
    attach,
    beam_rows,
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
    EOS,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    Picture,
    make_inputs,
    single_row,
    tiny_model,
)


@each_family
@each_backend
def test_beam_scores_are_what_the_naive_model_gives_their_tokens(family, backend):
    inputs = make_inputs(family, beam_rows(family))
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    out = generate(model, inputs, num_beams=3, num_return_sequences=3, output_scores=True)
    for beam, tokens in enumerate(answers(out, inputs)):
        logprob = expected(family, inputs, handle, tokens, beam // 3).log_softmax(-1)
        score = logprob[torch.arange(NEW), tokens].mean()  # length penalty 1: the mean
        assert abs(score - out.sequences_scores[beam]) < 1e-5


@each_family
@each_backend
def test_two_rows_of_three_beams_equal_single_rows(family, backend):
    """Beams of a row must be expanded with its own images, sizes and padding."""
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    attach(model, backend=backend)
    beams = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    together = generate(model, inputs, **beams)
    for row in range(2):
        alone = single_row(inputs, row)
        out = generate(model, alone, **beams)
        mine = slice(3 * row, 3 * row + 3)
        assert torch.equal(answers(together, inputs)[mine], answers(out, alone))
        assert_close(together.sequences_scores[mine], out.sequences_scores)


@each_family
@each_backend
def test_beams_keep_counts_in_the_order_of_the_original_rows(family, backend):
    inputs = make_inputs(family, [(5, Picture(8, 12), 7), (9, Picture(6, 10), 4)])
    model = tiny_model(family)
    handle = attach(model, backend=backend, keep=[5, 11])
    out = generate(model, inputs, num_beams=2, output_scores=True)
    for row, tokens in enumerate(answers(out, inputs)):
        logprob = expected(family, inputs, handle, tokens, row).log_softmax(-1)
        assert abs(logprob[torch.arange(NEW), tokens].mean() - out.sequences_scores[row]) < 1e-5


@each_family
@each_backend
def test_several_samples_of_a_row_share_its_prompt(family, backend):
    inputs = make_inputs(family, beam_rows(family))
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    torch.manual_seed(0)
    out = generate(model, inputs, do_sample=True, num_return_sequences=2)
    for sample, tokens in enumerate(answers(out, inputs)):
        assert_close(logits(out)[sample], expected(family, inputs, handle, tokens, sample // 2))


@each_family
@each_backend
@pytest.mark.parametrize("rows", [ONE_IMAGE, TWO_IMAGES])
def test_a_hand_written_decode_loop_is_the_naive_model(family, backend, rows):
    inputs = make_inputs(family, rows)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    logical = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    said, tokens = [out.logits[0, -1]], [int(out.logits[0, -1].argmax())]
    for t in range(NEW - 1):
        assert out.past_key_values.get_seq_length() == logical + t
        out = step(model, torch.tensor([tokens[-1:]]), out.past_key_values, logical + t)
        said.append(out.logits[0, -1])
        tokens.append(int(out.logits[0, -1].argmax()))
    assert_close(torch.stack(said), expected(family, inputs, handle, torch.tensor(tokens)))


@each_family
@each_backend
def test_verifying_several_tokens_at_once_equals_one_by_one_and_can_be_taken_back(family, backend):
    """What assisted decoding does: a forward of many tokens on the cache, then a crop."""
    inputs = make_inputs(family)
    model = tiny_model(family)
    handle = attach(model, backend=backend)
    logical = inputs["input_ids"].shape[1]
    draft = torch.tensor([[17, 40, 5, 99]])
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    wrong = step(model, draft.flip(1), past, logical).past_key_values
    wrong.crop(-3)  # the first of the wrong draft stays
    assert wrong.get_seq_length() == logical + 1
    right = torch.cat([draft[:, -1:], draft], 1)
    got = step(model, draft, wrong, logical + 1).logits[0]
    tokens = torch.cat([right[0], right[0, :1]])  # the last one is only asked for, never fed
    assert_close(got, expected(family, inputs, handle, tokens)[2:])


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


@each_backend
def test_embeddings_in_place_of_ids_are_reduced_the_same(backend):
    inputs = make_inputs("llava", TWO_IMAGES)
    model = tiny_model("llava")
    attach(model, backend=backend)
    want = forward(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(forward(model, {**inputs, "inputs_embeds": embeds}), want)


@each_family
@each_backend
def test_prompt_lookup_says_what_greedy_decoding_says(family, backend):
    inputs = make_inputs(family)
    model = tiny_model(family)
    model.generation_config.eos_token_id = EOS  # prompt lookup needs one
    handle = attach(model, backend=backend)
    greedy = generate(model, inputs, max_new_tokens=12)
    out = generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=4)
    assert torch.equal(out.sequences, greedy.sequences)
    assert_is_naive(family, inputs, handle, out)


@each_family
@each_backend
@pytest.mark.parametrize("assistant_reduces", [False, True])
def test_an_assistant_model_changes_nothing_of_what_is_said(family, backend, assistant_reduces):
    inputs = make_inputs(family)
    model, assistant = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for parameter in assistant.parameters():  # right often, wrong at times
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    attach(model, backend=backend)
    greedy = generate(model, inputs, max_new_tokens=12)
    if assistant_reduces:
        attach(assistant, backend=backend, keep_ratio=0.5)
    out = generate(model, inputs, max_new_tokens=12, assistant_model=assistant)
    assert torch.equal(out.sequences, greedy.sequences)
    assert_close(logits(out), logits(greedy))


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
