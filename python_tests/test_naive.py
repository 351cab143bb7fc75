"""The naive reference against stock transformers: before it judges a hook, it must be right."""

import pytest
import torch
from hf_harness import answers, assert_close, each_family, forward, generate, logits, naive, stock
from naive import Setting, Tokens

from restore_ext.testing.models import (
    ADJACENT_IMAGES,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    make_inputs,
    single_row,
)

PLAIN = Setting(size=False, distance=False)


@each_family
@pytest.mark.parametrize("rows", [ONE_IMAGE, TWO_IMAGES, ADJACENT_IMAGES, RAGGED, TEXT_ONLY])
def test_it_speaks_as_the_stock_model_when_nothing_is_reduced(family, rows):
    inputs = make_inputs(family, rows)
    out = generate(stock(family), inputs)
    for row, tokens in enumerate(answers(out, inputs)):
        prompt = naive(family).prompt(single_row(inputs, row))
        assert_close(logits(out)[row], naive(family).logits(prompt, tokens.tolist(), PLAIN))


@each_family
def test_its_forward_is_the_stock_forward_at_every_position(family):
    inputs = make_inputs(family, TWO_IMAGES)
    want = forward(stock(family), inputs)[0]
    got = naive(family).forward(naive(family).prompt(inputs), PLAIN)
    assert_close(got, want)


@each_family
def test_float32_and_float64_agree(family):
    inputs = make_inputs(family)
    single, double = (
        model.forward(model.prompt(inputs), PLAIN)
        for model in (naive(family, torch.float32), naive(family, torch.float64))
    )
    assert_close(single, double)


@each_family
def test_a_token_of_size_three_counts_as_three_equal_tokens(family):
    """log(size) in the bias is what three copies at one position would do, for the tokens after."""
    model = naive(family)
    full = model.prompt(make_inputs(family, TEXT_ONLY))
    merged = Tokens(
        full.x, full.position, full.size.clone(), full.uniform, full.distant, full.following
    )
    merged.size[4] = 3
    copies = torch.tensor([*range(4), 4, 4, 4, *range(5, len(full))])
    spread = Tokens(
        full.x[copies],
        full.position[:, copies],
        full.size[copies],
        full.uniform[copies],
        full.distant[copies],
        full.following,
    )
    # The copies themselves see fewer of each other: only what follows them can be compared, in a
    # model of one layer.
    setting = Setting(distance=False, uniform_first=False)
    layers = model.config.num_hidden_layers
    model.config.num_hidden_layers = 1
    try:
        got, want = model.forward(merged, setting)[5:], model.forward(spread, setting)[7:]
    finally:
        model.config.num_hidden_layers = layers
    assert_close(got, want, 1e-12)


@each_family
def test_its_distance_bias_grows_from_zero_and_is_symmetric(family):
    model = naive(family)
    bias = model.distance_bias(model.prompt(make_inputs(family)).position)
    assert bias.diagonal().abs().max() == 0
    assert torch.equal(bias, bias.T)
    assert bias.min() >= 0 and bias.max() > 0.3
