"""PaliGemma, PaliGemma 2 and Gemma 3: who sees whom when a prompt gets shorter."""

import dataclasses

import pytest
import torch
import transformers
from dense import Dense
from family_checks import (
    MASKS,
    ROWS,
    TOLERANCE,
    assert_generates_dense,
    dense,
    model,
    row_inputs,
)
from hf_harness import answers, assert_close, attach, each_backend, generate, logits
from naive import Setting
from test_hf_scores import seen_scores
from torch.nn.functional import pad

import restore_ext
from restore_ext.hf.families import find_family
from restore_ext.hf.visible import Blocks
from restore_ext.testing.models import (
    TINY,
    TWO_IMAGES,
    VERSION,
    Picture,
    make_inputs,
    tiny_model,
)

each = pytest.mark.parametrize("family", MASKS)
each_with_blocks = pytest.mark.parametrize("family", ["paligemma", "paligemma2", "gemma3"])
# Before 5.17 all of a turn of PaliGemma sees itself, so that two turns are not one prompt.
ONE_OF_TURNS = ("paligemma", "paligemma2") if VERSION >= (5, 17) else ()
each_windowed = pytest.mark.parametrize("family", ["paligemma2", "gemma3", "aya_vision"])

POOLED = ("gemma3", "aya_vision")  # 16 tokens of 64 patches


@each
@each_backend
def test_a_shorter_sequence_with_positions_of_its_own_is_the_reference(family, backend):
    setting = {"size": False, "distance": False, "reindex": True}
    with attach(model(family), backend=backend, restore=False) as handle:
        assert_generates_dense(family, handle, **setting)


@each_with_blocks
def test_the_reference_sees_forward_and_no_further_than_a_window(family):
    """What the other tests compare with has what they are about."""
    [inputs] = row_inputs(family, ROWS[:1])
    allowed = dense(family).prompt(inputs).allowed
    S = inputs["input_ids"].shape[1]
    forward = torch.ones(S, S, dtype=torch.bool).triu(1)
    assert all((sees & forward).any() for sees in allowed)
    causal = ~forward
    cut = [bool((causal & ~sees).any()) for sees in allowed]
    # All of PaliGemma's prompt is a block, which no window of PaliGemma 2 cuts.
    assert cut == ([True, False] * 2 if family == "gemma3" else [False] * 4)


@each_with_blocks
@each_backend
def test_a_prompt_of_which_a_part_is_causal_is_the_reference(family, backend):
    """PaliGemma: the text behind the images is an answer; Gemma 3: one image is marked as text."""
    [inputs] = row_inputs(family, TWO_IMAGES)
    kinds = inputs["token_type_ids"]
    if family == "gemma3":
        kinds[:, : kinds.shape[1] // 2] = 0
    else:
        kinds[:, -4:] = 1
    with attach(model(family), backend=backend) as handle:
        assert_is_dense(family, handle, inputs)


@each_with_blocks
def test_without_token_types_all_of_a_prompt_sees_itself_and_no_image_does(family):
    [inputs] = row_inputs(family, TWO_IMAGES)
    silent = {name: x for name, x in inputs.items() if name != "token_type_ids"}
    with attach(model(family)) as handle:
        assert_is_dense(family, handle, silent, silent if family == "gemma3" else inputs)


def assert_is_dense(family: str, handle, inputs: dict, meant: dict | None = None) -> None:
    """generate() on one row has the logits of the reference of what was `meant` by it."""
    out = generate(model(family), inputs)
    tokens = answers(out, inputs)[0].tolist()
    full = dense(family).prompt(meant or inputs)
    want = dense(family).logits(full, handle.last.plan, 0, tokens, Setting())
    assert_close(logits(out)[0], want, TOLERANCE)


@pytest.mark.parametrize("family", [*ONE_OF_TURNS, *POOLED])
@each_backend
def test_images_of_two_turns_are_those_of_one_prompt(family, backend):
    """A later image on a reduced cache: its tokens see what is in the window, and each other where
    the family has it so."""
    [inputs] = row_inputs(family, [(5, Picture(8, 8), 3, Picture(8, 8), 6)])
    S = inputs["input_ids"].shape[1]
    if family in POOLED:
        at = S // 2
    else:
        at = 5 + 64 + 1
        inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
        inputs["token_type_ids"][:, 5 + 64 + 3 : 5 + 64 + 3 + 64] = 0
    with attach(model(family), backend=backend) as handle, torch.no_grad():
        want = model(family)(**inputs).logits
        whole = handle.last
        first = {name: x[:, :at] for name, x in inputs.items() if name != "pixel_values"}
        past = model(family)(**first, pixel_values=inputs["pixel_values"][:1], use_cache=True)
        second = {**inputs, "pixel_values": inputs["pixel_values"][1:]}
        second["input_ids"] = inputs["input_ids"][:, at:]
        if VERSION < (5, 0):
            second["cache_position"] = torch.arange(at, S)
        got = model(family)(**second, past_key_values=past.past_key_values, use_cache=True).logits
    left = int((whole.plan.source[0] >= at).sum())
    assert got.shape[1] == left < S - at
    assert_close(got[:, -3:], want[:, -3:], TOLERANCE)


@each_windowed
def test_a_window_that_has_dropped_keys_is_refused_by_name(family):
    text = torch.arange(40, 60)[None]
    inputs = make_inputs(family, TWO_IMAGES)
    del inputs["attention_mask"]
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = pad(inputs["token_type_ids"], (20, 0))
    with torch.no_grad(), attach(model(family)):
        past = model(family)(input_ids=text, use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match="sliding window has dropped"):
            model(family)(**inputs, past_key_values=past, use_cache=True)


@pytest.mark.parametrize("family", [*ONE_OF_TURNS, *POOLED])
def test_a_cache_within_its_windows_goes_on(family):
    """Text before the image, in a turn of its own."""
    [inputs] = row_inputs(family, [(9, Picture(8, 8), 6)])
    text = {"input_ids": inputs["input_ids"][:, :5]}
    if family in ONE_OF_TURNS:
        inputs["token_type_ids"][:, :5] = 1  # what sees forward starts with the second turn
        text["token_type_ids"] = inputs["token_type_ids"][:, :5]
    with torch.no_grad(), attach(model(family), calibrate="size"):
        want = model(family)(**inputs).logits
        past = model(family)(**text, use_cache=True).past_key_values
        second = {**inputs, "input_ids": inputs["input_ids"][:, 5:]}
        if VERSION < (5, 0):
            second["cache_position"] = torch.arange(5, inputs["input_ids"].shape[1])
        got = model(family)(**second, past_key_values=past, use_cache=True).logits
    assert_close(got[:, -3:], want[:, -3:], TOLERANCE)


@each_backend
def test_a_window_in_every_layer_without_layer_types_is_the_reference(monkeypatch, backend):
    """As in BakLLaVA, whose Mistral has sliding_window alone."""

    def config(text):
        built = TINY["llava"].config(text)
        built.text_config = transformers.MistralConfig(**text, sliding_window=40)
        return built

    monkeypatch.setitem(TINY, "mistral", dataclasses.replace(TINY["llava"], config=config))
    one = tiny_model("mistral")
    inputs = make_inputs("mistral", [(5, Picture(8, 8), 30, Picture(8, 8), 4)])
    reference = Dense(one)
    reference._window = lambda layer: 40
    with attach(one, method="divprune", keep=8, backend=backend) as handle:
        assert find_family(one).windows == [40] * 4
        out = generate(one, inputs)
    full, tokens = reference.prompt(inputs), answers(out, inputs)[0].tolist()
    assert not full.allowed[0][-1, 0]
    want = reference.logits(full, handle.last.plan, 0, tokens, Setting())
    assert_close(logits(out)[0], want, TOLERANCE)


@each
def test_prepared_inputs_cannot_carry_the_mask(family):
    """generate() makes its own, from the shorter sequence."""
    with pytest.raises(NotImplementedError, match=r"prepare_inputs.*attach\(\)"):
        restore_ext.prepare_inputs(model(family), **make_inputs(family), keep_ratio=0.3)


@each
def test_scores_are_the_mean_attention_received_in_the_last_layer(monkeypatch, family):
    inputs = make_inputs(family, TWO_IMAGES)
    got = seen_scores(monkeypatch, model(family), lambda m: m(**inputs))
    eager = Dense(model(family)).model.float()
    with torch.no_grad():
        tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    want = tower.attentions[-1].mean((1, 2))  # [images, 64]
    if family in POOLED:
        want = want.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    assert torch.stack(got).allclose(want, rtol=0, atol=1e-6)


def test_blocks_are_runs_of_one_number():
    number = torch.tensor([[-1, 0, 0, 1, 1, -1, -1, 1], [2, 2, -1, 0, -1, 3, 3, 3]])
    blocks = Blocks.of(number)
    assert blocks.first.tolist() == [[0, 1, 1, 3, 3, 5, 6, 7], [0, 0, 2, 3, 4, 5, 5, 5]]
    assert blocks.past.tolist() == [[1, 3, 3, 5, 5, 6, 7, 8], [2, 2, 3, 4, 5, 8, 8, 8]]


@each_windowed
def test_the_report_knows_what_stock_would_store(family):
    inputs = make_inputs(family, TWO_IMAGES)
    with torch.no_grad():
        layers = model(family)(**inputs, use_cache=True).past_key_values.layers
        with attach(model(family)) as handle:
            model(family)(**inputs)
    stored = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in layers)
    assert handle.last.kv_bytes_stock == stored
