"""prepare_inputs(): shortened inputs for stock generate() with any cache, compiled decoding too.

What it must say is what attach() says, which the other files hold against the naive model, as two
tests here do with what is peculiar to it: static caches, compiled.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from hf_harness import (
    NEW,
    answers,
    assert_close,
    assert_is_naive,
    attach,
    beam_rows,
    each_backend,
    each_family,
    fingerprint,
    forward,
    fresh,
    generate,
    logits,
    stock,
    with_defaults,
)
from test_hf_refusals import WRONG, offloaded, quantised, smollm3_llava

import restore_ext
from restore_ext.testing.models import (
    ADJACENT_IMAGES,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    make_inputs,
    tiny_model,
)

SETTINGS = [
    {},
    {"calibrate": "size"},
    {"calibrate": "none"},
    {"layer0": "size"},
    {"decode_distance": True},
    {"restore": False, "positions": "original"},
    {"method": "tome"},
    {"keep": 6},
]
# Beside LLaVA and Qwen: what becomes of newlines, of features in one tensor, and of those by rows.
PREPARED = (
    "llava_next",
    "llava_onevision",
    "llava_onevision_several",
    "internvl",
    "mistral3",
    "pixtral",
    "idefics3",
    "smolvlm",
    "qwen2_vl",
    "glm4v",
)


def attached(family: str, inputs: dict, options: dict, **how):
    model = fresh(family)
    attach(model, **options)
    return generate(model, inputs, **how)


def prepare(model, inputs: dict, **options):
    return restore_ext.prepare_inputs(model, **inputs, **with_defaults(options))


def spoken(model, prepared, **how):
    asked = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with prepared:
        return model.generate(**prepared, **{**asked, **how})


def assert_same(out, want, inputs: dict) -> None:
    assert torch.equal(out.sequences, want.sequences)  # the original prompt comes back with it
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert_close(logits(out), logits(want))


@each_family
@each_backend
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_every_setting_says_what_an_attached_model_says(family, backend, options):
    options = {**options, "backend": backend}
    inputs = make_inputs(family, TWO_IMAGES)
    model = fresh(family)
    out = spoken(model, prepare(model, inputs, **options))
    assert_same(out, attached(family, inputs, options), inputs)


@each_backend
def test_reindexed_positions_say_what_an_attached_model_says(backend):
    options = {"restore": False, "backend": backend}
    inputs = make_inputs("llava", RAGGED)
    model = fresh("llava")
    out = spoken(model, prepare(model, inputs, **options))
    assert_same(out, attached("llava", inputs, options), inputs)


@each_family
@each_backend
@pytest.mark.parametrize("rows", [ONE_IMAGE, ADJACENT_IMAGES, RAGGED])
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_static_cache_says_what_an_attached_model_says(family, backend, rows, cache):
    inputs = make_inputs(family, rows)
    model = fresh(family)
    how = {"cache_implementation": cache} if cache else {}
    out = spoken(model, prepare(model, inputs, backend=backend), **how)
    assert_same(out, attached(family, inputs, {"backend": backend}), inputs)
    if cache:
        assert "Static" in type(out.past_key_values.layers[0]).__name__


@each_family
@each_backend
@pytest.mark.parametrize("decode_distance", [False, True])
def test_a_static_cache_says_what_the_naive_model_says(family, backend, decode_distance):
    inputs, model = make_inputs(family, RAGGED), fresh(family)
    prepared = prepare(model, inputs, backend=backend, decode_distance=decode_distance)
    out = spoken(model, prepared, cache_implementation="static")
    handle = SimpleNamespace(last=prepared.report)
    assert_is_naive(family, inputs, handle, out, decode_distance=decode_distance)


def compiled(**options) -> dict:
    """What generate() takes to compile its decoding on a static cache, on a CPU too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling = transformers.CompileConfig(fullgraph=True, mode="default", **options)
    compiling._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compiling}


@each_family
@each_backend
def test_decoding_compiles_to_one_full_graph_and_is_the_naive_model(family, backend):
    inputs = make_inputs(family, RAGGED)
    model = fresh(family)
    want = attached(family, inputs, {"backend": backend})
    prepared = prepare(model, inputs, backend=backend)
    out = spoken(model, prepared, **compiled(backend="eager"))
    assert_same(out, want, inputs)
    assert_is_naive(family, inputs, SimpleNamespace(last=prepared.report), out)
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] >= 1
    assert not counted["graph_break"]


@each_backend
def test_decoding_compiled_by_inductor_says_the_same(backend):
    inputs = make_inputs("llava")
    model = tiny_model("llava", num_hidden_layers=2)
    attach(model, backend=backend).detach()
    with attach(model, backend=backend):
        want = generate(model, inputs)
    how = compiled()
    assert_same(spoken(model, prepare(model, inputs, backend=backend), **how), want, inputs)


@each_family
@each_backend
@pytest.mark.parametrize("cache", [None, "static"])
def test_beams_say_what_an_attached_model_says(family, backend, cache):
    inputs = make_inputs(family, beam_rows(family))
    model = fresh(family)
    how = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    want = attached(family, inputs, {"backend": backend}, **how)
    how |= {"cache_implementation": cache} if cache else {}
    out = spoken(model, prepare(model, inputs, backend=backend), **how)
    assert torch.equal(answers(out, inputs), answers(want, inputs))
    assert_close(out.sequences_scores, want.sequences_scores)


@each_family
@each_backend
@pytest.mark.parametrize("cache", [quantised, offloaded])
def test_the_caches_attach_refuses_are_taken(family, backend, cache):
    inputs = make_inputs(family)
    model = fresh(family)
    how = {"past_key_values": cache(model)["past_key_values"]}
    how["past_key_values"].offloading = False  # on a CPU nothing can be offloaded
    out = spoken(model, prepare(model, inputs, backend=backend), **how)
    assert_same(out, attached(family, inputs, {"backend": backend}), inputs)


@each_family
@each_backend
def test_the_shortened_inputs_are_short(family, backend):
    inputs = make_inputs(family, RAGGED)
    prepared = prepare(fresh(family), inputs, backend=backend)
    B, S = inputs["input_ids"].shape
    T = prepared.report.plan.valid.shape[1]
    assert prepared["inputs_embeds"].shape[1] == T
    assert T < S
    assert prepared["attention_mask"].shape == (B, T)
    assert prepared["position_ids"].shape[-2:] == (B, T)
    assert torch.equal(prepared["input_ids"], inputs["input_ids"])


@each_family
@each_backend
@pytest.mark.parametrize(
    ("rows", "options"), [(TEXT_ONLY, {}), (RAGGED, {"keep": 64}), (RAGGED, {"keep_ratio": 1.0})]
)
def test_with_nothing_to_reduce_it_says_what_stock_says(family, backend, rows, options):
    inputs = make_inputs(family, rows)
    model = fresh(family)
    prepared = prepare(model, inputs, backend=backend, **options)
    assert prepared.report is None
    out, want = spoken(model, prepared), generate(stock(family), inputs)
    assert torch.equal(out.sequences, want.sequences)
    assert torch.equal(logits(out), logits(want))


@each_family
@each_backend
def test_the_model_stays_stock_for_every_other_call(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    prepared = prepare(model, inputs, backend=backend)
    for rows in (ONE_IMAGE, TEXT_ONLY, RAGGED):
        plain = make_inputs(family, rows)
        assert torch.equal(forward(model, plain), forward(stock(family), plain))
        got = logits(generate(model, plain))
        assert torch.equal(got, logits(generate(stock(family), plain)))
    assert_same(spoken(model, prepared), attached(family, inputs, {"backend": backend}), inputs)
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))


@each_family
@each_backend
def test_outside_its_block_it_cannot_be_used_and_the_model_is_whole_again(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    before = fingerprint(model)
    prepared = prepare(model, inputs, backend=backend)
    with pytest.raises(RuntimeError, match="with prepared"):
        model.generate(**prepared)
    with pytest.raises(ZeroDivisionError), prepared:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="with prepared"):
        model.generate(**prepared)
    assert fingerprint(model) == before
    assert_same(spoken(model, prepared), attached(family, inputs, {"backend": backend}), inputs)
    assert fingerprint(model) == before


@each_family
@each_backend
def test_inside_its_block_the_model_takes_no_other_prompt(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    prepared = prepare(model, inputs, backend=backend)
    with prepared:
        for rows in (RAGGED, TEXT_ONLY, TWO_IMAGES):
            with pytest.raises(RuntimeError):
                forward(model, make_inputs(family, rows))
    assert_same(spoken(model, prepared), attached(family, inputs, {"backend": backend}), inputs)


@each_family
def test_two_prepared_prompts_do_not_mix(family):
    model = fresh(family)
    both = [make_inputs(family, rows, seed=s) for s, rows in enumerate((RAGGED, TWO_IMAGES))]
    prepared = [prepare(model, inputs) for inputs in both]
    for inputs, ready in zip(both[::-1], prepared[::-1], strict=True):
        assert_same(spoken(model, ready), attached(family, inputs, {}), inputs)


@each_family
def test_it_leaves_an_attached_model_attached(family):
    model, inputs = fresh(family), make_inputs(family)
    attach(model, keep_ratio=0.5)
    want = generate(model, inputs)
    out = spoken(model, prepare(model, inputs))
    assert_same(out, attached(family, inputs, {}), inputs)
    assert torch.equal(logits(generate(model, inputs)), logits(want))


@each_family
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_it_refuses_what_attach_refuses(family, wrong):
    options, error, words = wrong
    model = fresh(family)
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        restore_ext.prepare_inputs(model, **make_inputs(family), **options)
    for word in words:
        assert word in str(caught.value)
    assert fingerprint(model) == before


@each_backend
def test_it_refuses_layers_that_differ_in_rope_where_the_distance_counts(backend):
    model, inputs = smollm3_llava([1, 1, 1, 0]), make_inputs("llava")
    with pytest.raises(NotImplementedError, match=r"^model.*RoPE.*SmolLM3.*calibrate='size'"):
        prepare(model, inputs, backend=backend)
    assert prepare(model, inputs, backend=backend, calibrate="size").report is not None


@each_backend
def test_a_model_without_rope_has_no_distance_term(backend):
    model, inputs = smollm3_llava([0, 0, 0, 0]), make_inputs("llava")
    far, near = (
        logits(spoken(model, prepare(model, inputs, backend=backend, calibrate=calibrate)))
        for calibrate in ("size+distance", "size")
    )
    assert torch.equal(far, near)


def test_a_head_size_the_op_does_not_have_falls_back_to_the_mask():
    model, inputs = tiny_model("llava", head_dim=20), make_inputs("llava")
    want = logits(spoken(model, prepare(model, inputs, backend="mask")))
    with pytest.warns(UserWarning, match=r"^backend='op' falls back to backend='mask': .* got 20$"):
        prepared = prepare(model, inputs)
    assert torch.equal(logits(spoken(model, prepared)), want)


def test_prepare_inputs_leaves_the_language_model_alone():
    model, inputs = tiny_model("llava"), make_inputs("llava")
    with pytest.raises(NotImplementedError, match="'fastv' works inside the language model"):
        restore_ext.prepare_inputs(model, **inputs, method="fastv", keep=5)


@pytest.mark.parametrize("family", PREPARED)
def test_every_family_says_what_it_says_attached(family):
    inputs = make_inputs(family, TWO_IMAGES if family.endswith("several") else RAGGED)
    options, model = {"method": "vispruner", "keep_ratio": 0.3}, tiny_model(family)
    with restore_ext.attach(model, **options):
        want = generate(model, inputs)
    assert_same(spoken(model, restore_ext.prepare_inputs(model, **inputs, **options)), want, inputs)
