"""Ways to decode other than plain greedy generate(): each must be the naive model too."""

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
    step,
)
from transformers.generation.candidate_generator import CandidateGenerator

from restore_ext.testing.models import (
    EOS,
    ONE_IMAGE,
    RAGGED,
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
@pytest.mark.parametrize("assistant_reduces", [True, False])
def test_an_assistant_model_changes_nothing_of_what_is_said(family, backend, assistant_reduces):
    inputs = make_inputs(family)
    model, assistant = tiny_model(family), tiny_model(family)
    attach(model, backend=backend)
    greedy = generate(model, inputs, max_new_tokens=12)
    if assistant_reduces:
        attach(assistant, backend=backend, keep_ratio=0.5)
    out = generate(model, inputs, max_new_tokens=12, assistant_model=assistant)
    assert torch.equal(out.sequences, greedy.sequences)
    assert_close(logits(out), logits(greedy))


class Oracle(CandidateGenerator):
    """Drafts what greedy decoding said, four tokens at a time, of which `right` are left right."""

    def __init__(self, said: torch.Tensor, right: int):
        self.said, self.right = said, right

    def get_candidates(self, input_ids, *_, **__):
        draft = self.said[:, input_ids.shape[1] :][:, :4].clone()
        draft[:, self.right :] = 5
        return torch.cat([input_ids, draft], 1), None

    def update_candidate_strategy(self, *_):
        pass


@each_family
@each_backend
@pytest.mark.parametrize("right", [4, 2, 0])
def test_drafts_behind_the_prompt_are_verified_as_what_follows_it(
    monkeypatch, family, backend, right
):
    """The first forward of assisted decoding brings the images and a draft: right ones stay."""
    inputs = make_inputs(family)
    model = tiny_model(family)
    model.generation_config.eos_token_id = EOS
    handle = attach(model, backend=backend)
    greedy = generate(model, inputs, max_new_tokens=12)
    assert_is_naive(family, inputs, handle, greedy)
    handle.detach()
    said = greedy.sequences
    oracle = Oracle(said, right)
    monkeypatch.setattr(type(model), "_get_candidate_generator", lambda *_, **__: oracle)
    attach(model, backend=backend)
    out = generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=4)
    assert torch.equal(out.sequences, said)
    assert_close(logits(out), logits(greedy))
