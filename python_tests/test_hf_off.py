"""Where nothing is reduced the model is stock: the same bits, not nearly the same."""

import pytest
import torch
from hf_harness import (
    RATIO,
    attach,
    each_backend,
    each_family,
    fingerprint,
    forward,
    fresh,
    generate,
    logits,
)

import restore_ext
from restore_ext.testing.models import (
    ADJACENT_IMAGES,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    make_inputs,
)

each_attention = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def says(model, inputs: dict) -> tuple[torch.Tensor, ...]:
    """All there is to compare: a forward, a greedy and a beam search."""
    greedy = generate(model, inputs)
    beams = generate(model, inputs, num_beams=2, output_scores=True)
    return (
        forward(model, inputs),
        forward(model, inputs, use_cache=False),
        greedy.sequences,
        logits(greedy),
        beams.sequences,
        beams.sequences_scores,
        greedy.past_key_values.layers[-1].keys,
    )


def assert_same_bits(got: tuple, want: tuple) -> None:
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@each_family
@each_backend
@each_attention
@pytest.mark.parametrize("rows", [ONE_IMAGE, RAGGED])
def test_a_disabled_handle_leaves_the_same_bits(family, backend, attn, rows):
    model, inputs = fresh(family, attn=attn), make_inputs(family, rows)
    want = says(model, inputs)
    attach(model, backend=backend, enabled=False)
    assert_same_bits(says(model, inputs), want)


@each_family
@each_backend
@each_attention
@pytest.mark.parametrize("rows", [TEXT_ONLY, [(23,), (9,)]])
def test_text_alone_has_the_same_bits(family, backend, attn, rows):
    model, inputs = fresh(family, attn=attn), make_inputs(family, rows)
    want = says(model, inputs)
    attach(model, backend=backend)
    assert_same_bits(says(model, inputs), want)


@each_family
@each_backend
@each_attention
@pytest.mark.parametrize("budget", [{"keep": 64}, {"keep": 1000}, {"keep_ratio": 1.0}])
def test_images_within_their_budget_have_the_same_bits(family, backend, attn, budget):
    model, inputs = fresh(family, attn=attn), make_inputs(family, RAGGED)
    want = says(model, inputs)
    attach(model, backend=backend, **budget)
    assert_same_bits(says(model, inputs), want)


@each_family
@each_backend
@each_attention
@pytest.mark.parametrize("rows", [ONE_IMAGE, RAGGED])
def test_detach_restores_the_same_bits_and_the_same_model(family, backend, attn, rows):
    model, inputs = fresh(family, attn=attn), make_inputs(family, rows)
    before, want = fingerprint(model), says(model, inputs)
    handle = attach(model, backend=backend)
    assert not torch.equal(forward(model, make_inputs(family)), want[0])
    says(model, inputs)
    handle.detach()
    assert fingerprint(model) == before
    assert_same_bits(says(model, inputs), want)
    assert fingerprint(model) == before


@each_family
@each_backend
def test_a_handle_switches_off_and_on(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    stock = says(model, inputs)
    handle = attach(model, backend=backend)
    reduced = says(model, inputs)
    assert reduced[-1].shape[2] < stock[-1].shape[2]
    handle.enabled = False
    assert_same_bits(says(model, inputs), stock)
    handle.enabled = True
    assert_same_bits(says(model, inputs), reduced)


@each_family
@each_backend
def test_attaching_twice_equals_attaching_once(family, backend):
    model, inputs = fresh(family), make_inputs(family, TWO_IMAGES)
    before, stock = fingerprint(model), says(model, inputs)
    attach(model, backend=backend)
    once, hooked = says(model, inputs), fingerprint(model)
    attach(model, backend=backend, keep_ratio=0.9)
    handle = attach(model, backend=backend)
    assert_same_bits(says(model, inputs), once)
    assert fingerprint(model) == hooked
    handle.detach()
    assert fingerprint(model) == before
    assert_same_bits(says(model, inputs), stock)


@each_family
def test_a_replaced_handle_cannot_undo_its_successor(family):
    model, inputs = fresh(family), make_inputs(family)
    first = attach(model, keep_ratio=0.9)
    second = attach(model)
    want = says(model, inputs)
    first.detach()
    assert_same_bits(says(model, inputs), want)
    second.detach()
    assert_same_bits(says(model, inputs), says(fresh(family), inputs))


@each_family
@each_backend
def test_detaching_twice_is_detaching_once(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    before, want = fingerprint(model), says(model, inputs)
    handle = attach(model, backend=backend)
    handle.detach()
    handle.detach()
    assert fingerprint(model) == before
    assert_same_bits(says(model, inputs), want)


@each_family
@each_backend
def test_a_with_block_attaches_for_its_length_even_when_it_fails(family, backend):
    model, inputs = fresh(family), make_inputs(family, ADJACENT_IMAGES)
    before, want = fingerprint(model), says(model, inputs)
    with restore_ext.attach(model, keep_ratio=RATIO, backend=backend) as handle:
        assert says(model, inputs)[-1].shape[2] < want[-1].shape[2]
        assert handle.last.images
    assert_same_bits(says(model, inputs), want)
    with (
        pytest.raises(ZeroDivisionError),
        restore_ext.attach(model, keep_ratio=RATIO, backend=backend),
    ):
        raise ZeroDivisionError
    assert fingerprint(model) == before
    assert_same_bits(says(model, inputs), want)


@each_family
@each_backend
def test_an_error_in_the_middle_of_a_forward_leaves_nothing_behind(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    handle = attach(model, backend=backend)
    want = says(model, inputs)
    layer = model.model.language_model.layers[2]

    def fail(*_):
        raise ZeroDivisionError

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generate(model, inputs)
    hook.remove()
    text = make_inputs(family, TEXT_ONLY)
    assert_same_bits(says(model, text), says(fresh(family), text))
    assert_same_bits(says(model, inputs), want)
    handle.detach()
    assert_same_bits(says(model, inputs), says(fresh(family), inputs))
