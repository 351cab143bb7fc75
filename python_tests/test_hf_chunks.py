"""generate(prefill_chunk_size=...): refused where an image is reduced, stock everywhere else."""

import re
from contextlib import suppress

import pytest
import torch
from hf_harness import attach, each_backend, each_family, forward, fresh, generate, logits, stock

from restore_ext.testing.models import ONE_IMAGE, TWO_IMAGES, VERSION, Picture, make_inputs


@each_family
@each_backend
@pytest.mark.parametrize("chunk", [20, 1000])
@pytest.mark.parametrize(
    ("rows", "budget"),
    [(ONE_IMAGE, {}), (TWO_IMAGES, {"keep": [1000, 5]})],
)
def test_chunks_are_refused_where_an_image_is_reduced(family, backend, chunk, rows, budget):
    model, inputs = fresh(family), make_inputs(family, rows)
    attach(model, backend=backend, **budget)
    want = forward(model, inputs)
    for beams in (1, 2) if VERSION >= (5, 0) else (1,):  # beams of 4.57 take a prompt whole
        with pytest.raises(NotImplementedError, match=f"prefill_chunk_size.*{chunk}"):
            generate(model, inputs, prefill_chunk_size=chunk, num_beams=beams)
    assert torch.equal(forward(model, inputs), want)


@each_family
def test_the_images_of_a_refused_prompt_are_forgotten(family):
    """The language model on its own, as long a sequence, has none."""
    model, inputs = fresh(family), make_inputs(family)
    attach(model)
    with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=20)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got, want = (
        one.model.language_model(inputs_embeds=embeds).last_hidden_state
        for one in (model, stock(family))
    )
    assert torch.equal(got, want)


@each_family
@each_backend
@pytest.mark.parametrize(("chunk", "beams"), [(20, 1), (20, 2), (1000, 1)])
@pytest.mark.parametrize("options", [{"keep": 1000}, {"keep": [1000, 64]}, {"enabled": False}])
def test_chunks_are_stocks_own_business_where_nothing_is_reduced(
    family, backend, chunk, beams, options
):
    model, inputs = fresh(family), make_inputs(family, TWO_IMAGES)
    attach(model, backend=backend, **options)
    how = {"prefill_chunk_size": chunk, "num_beams": beams}
    try:
        want = generate(fresh(family), inputs, **how)
    except (ValueError, IndexError, RuntimeError) as failure:  # before 5.18 stock often cannot
        with pytest.raises(type(failure), match=re.escape(str(failure))):
            generate(model, inputs, **how)
    else:
        got = generate(model, inputs, **how)
        assert torch.equal(got.sequences, want.sequences)
        assert all(torch.equal(g, w) for g, w in zip(got.logits, want.logits, strict=True))


@each_backend
def test_chunks_are_refused_for_an_image_behind_a_reduced_one(backend):
    """Within its budget, but its queries see the distance to what was reduced before."""
    inputs, later = make_inputs("llava"), make_inputs("llava", seed=1)
    model = fresh("llava")
    attach(model, backend=backend)
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    attach(model, backend=backend, keep=1000)
    for name in ("input_ids", "attention_mask"):
        later[name] = torch.cat([inputs[name], later[name]], 1)
    with pytest.raises(NotImplementedError, match=r"prefill_chunk_size.*20"):
        generate(model, later, past_key_values=past, prefill_chunk_size=20)


@each_backend
def test_chunks_behind_a_cache_count_the_new_images_alone(backend):
    inputs, later = make_inputs("llava"), make_inputs("llava", seed=1)
    told = {n: torch.cat([inputs[n], later[n]], 1) for n in ("input_ids", "attention_mask")}
    told["pixel_values"] = later["pixel_values"]

    def second_turn(model):
        with torch.no_grad():
            past = model(**inputs, use_cache=True).past_key_values
        try:
            return logits(generate(model, told, past_key_values=past, prefill_chunk_size=1000))
        except (ValueError, RuntimeError) as failure:  # before 5.18 stock cannot
            return f"{type(failure)} {failure}"

    model = fresh("llava")
    attach(model, backend=backend, keep=1000)
    got, want = second_turn(model), second_turn(stock("llava"))
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


@each_backend
def test_a_prompt_in_chunks_leaves_no_report(backend):
    model = fresh("qwen2_5_vl")
    handle = attach(model, backend=backend, keep=12)
    forward(model, make_inputs("qwen2_5_vl"))
    assert handle.last is not None
    with suppress(IndexError, RuntimeError):  # before 5.18 stock often cannot
        generate(model, make_inputs("qwen2_5_vl", [(5, Picture(6, 8), 7)]), prefill_chunk_size=20)
    assert handle.last is None
