"""Assisted decoding hands over the prompt with the first draft behind it: a draft is no prompt."""

import pytest
import torch
from family_checks import TOLERANCE
from hf_harness import assert_close, attach, each_backend, forward, generate, logits
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from restore_ext.testing.models import EOS, FAMILIES, make_inputs, tiny_model


# What M-RoPE adds and what a mask says must not reach from the prompt into the draft.
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl", "paligemma", "gemma3"])
@each_backend
@pytest.mark.parametrize("draft", [1, 3])
def test_a_draft_that_is_right_says_what_greedy_decoding_says(monkeypatch, family, backend, draft):
    inputs = make_inputs(family)
    model = tiny_model(family)
    model.generation_config.eos_token_id = EOS  # prompt lookup needs one
    attach(model, backend=backend)
    greedy = generate(model, inputs, max_new_tokens=8)
    drafted = []

    def foresee(self, input_ids, *_, **__):
        said = input_ids.shape[1]
        past = max(said, min(said + draft, greedy.sequences.shape[1] - 1))
        drafted.append(past - said)
        return greedy.sequences[:, :past], None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", foresee)
    out = generate(model, inputs, max_new_tokens=8, prompt_lookup_num_tokens=draft)
    assert drafted[0] == draft and len(drafted) < 8  # they were taken
    assert torch.equal(out.sequences, greedy.sequences)
    assert_close(logits(out), logits(greedy), TOLERANCE)
    later = make_inputs(family, seed=1)
    whole = forward(model, later)
    assert_close(forward(model, later, logits_to_keep=4), whole[:, -4:])  # no draft there
