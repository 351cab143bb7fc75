"""What the hook will not do, it says: which argument, what was wanted, what came. Nothing stays."""

import re

import pytest
import torch
import transformers
from dense import Dense
from hf_harness import (
    answers,
    assert_close,
    attach,
    each_backend,
    each_family,
    fingerprint,
    forward,
    fresh,
    generate,
    logits,
    step,
    stock,
)
from naive import Setting
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer, StaticCache

import restore_ext
from restore_ext.testing.models import (
    IMAGE,
    TEXT,
    TEXT_ONLY,
    TWO_IMAGES,
    make_inputs,
    tiny_model,
)

# options of attach, the error, and what its message must hold
WRONG = [
    ({}, ValueError, ["keep", "keep_ratio"]),
    ({"keep": 5, "keep_ratio": 0.5}, ValueError, ["keep", "keep_ratio"]),
    ({"keep": 0}, ValueError, ["keep", "0"]),
    ({"keep": -3}, ValueError, ["keep", "-3"]),
    ({"keep": 2.5}, (TypeError, ValueError), ["keep", "2.5"]),
    ({"keep": "64"}, (TypeError, ValueError), ["keep", "64"]),
    ({"keep": True}, (TypeError, ValueError), ["keep", "True"]),
    ({"keep": [4, 0]}, ValueError, ["keep", "0"]),
    ({"keep": []}, ValueError, ["keep"]),
    ({"keep_ratio": 0.0}, ValueError, ["keep_ratio", "0"]),
    ({"keep_ratio": 1.5}, ValueError, ["keep_ratio", "1.5"]),
    ({"keep_ratio": float("nan")}, ValueError, ["keep_ratio", "nan"]),
    ({"keep": 5, "method": "divprun"}, ValueError, ["method", "divprune", "vispruner", "divprun"]),
    ({"keep": 5, "method": None}, (TypeError, ValueError), ["method", "None"]),
    ({"keep": 5, "positions": "mean"}, ValueError, ["positions", "original", "reindex", "mean"]),
    ({"keep": 5, "calibrate": "far"}, ValueError, ["calibrate", "size+distance", "none", "far"]),
    ({"keep": 5, "calibrate": True}, (TypeError, ValueError), ["calibrate", "True"]),
    ({"keep": 5, "layer0": "real"}, ValueError, ["layer0", "uniform", "size", "real"]),
    ({"keep": 5, "backend": "cuda"}, ValueError, ["backend", "op", "mask", "cuda"]),
    ({"keep": 5, "retain": 1.5}, ValueError, ["retain", "1.5"]),
    ({"keep": 5, "retain": -0.1}, ValueError, ["retain", "-0.1"]),
    ({"keep": 5, "anchor_mode": "best"}, ValueError, ["anchor_mode", "paper", "official", "best"]),
    ({"keep": 5, "restore": "yes"}, (TypeError, ValueError), ["restore", "yes"]),
    ({"keep": 5, "decode_distance": 3}, (TypeError, ValueError), ["decode_distance", "3"]),
    ({"keep": 5, "seed": 0.5}, (TypeError, ValueError), ["seed", "0.5"]),
    ({"keep": 5, "no_such_option": 1}, TypeError, ["no_such_option"]),
]


def one(wrong: tuple) -> str:
    return "-".join(f"{name}={value}" for name, value in wrong[0].items()) or "nothing"


def assert_untouched(family: str, model, before: dict) -> None:
    inputs = make_inputs(family)
    assert fingerprint(model) == before
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))


def smollm3_llava(rope: list[int]):
    """A LLaVA whose text model turns queries and keys in some layers only, those with a 1."""
    config = tiny_model("llava").config
    text = {**TEXT, "no_rope_layers": rope}
    config.text_config = transformers.SmolLM3Config(**text, use_sliding_window=False)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


@each_family
@pytest.mark.parametrize("wrong", WRONG, ids=one)
def test_a_wrong_option_is_named_with_what_was_wanted_and_what_came(family, wrong):
    options, error, words = wrong
    model = fresh(family)
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        restore_ext.attach(model, **options)
    for word in words:
        assert word in str(caught.value)
    assert_untouched(family, model, before)


@each_family
def test_a_wrong_option_leaves_the_handle_there_was(family):
    model, inputs = fresh(family), make_inputs(family)
    handle = attach(model)
    want = forward(model, inputs)
    with pytest.raises(ValueError, match="method"):
        attach(model, method="none")
    assert torch.equal(forward(model, inputs), want)
    handle.detach()
    assert_untouched(family, model, fingerprint(fresh(family)))


@pytest.mark.parametrize("restore", [True, False])
def test_reindex_is_refused_by_name_for_mrope(restore):
    model = fresh("qwen2_5_vl")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"reindex.*M-RoPE|M-RoPE.*reindex"):
        attach(model, positions="reindex", restore=restore)
    assert_untouched("qwen2_5_vl", model, before)


def test_an_unknown_family_is_refused_with_the_known_ones():
    config = transformers.LlamaConfig(**TEXT)
    model = transformers.LlamaForCausalLM(config)
    names = sorted(vars(model))
    with pytest.raises((TypeError, ValueError), match="LlamaForCausalLM") as caught:
        attach(model)
    assert re.search("llava", str(caught.value), re.I)
    assert re.search(r"qwen2.?5.?vl", str(caught.value), re.I)
    assert sorted(vars(model)) == names
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("thing", [None, "llava", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises((TypeError, ValueError), match=type(thing).__name__):
        attach(thing)


class RoundedLayer(QuantizedLayer):
    """A quantised layer that needs no further package; it keeps what it is given."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def static(model):
    return {"cache_implementation": "static"}


def static_by_hand(model):
    return {"past_key_values": StaticCache(config=model.config.text_config, max_cache_len=200)}


def quantised(model):
    return {"past_key_values": Cache(layers=[RoundedLayer() for _ in range(4)])}


def quantised_one_by_one(model):
    return {"past_key_values": Cache(layer_class_to_replicate=RoundedLayer)}


def offloaded(model):
    cache = DynamicCache()
    cache.offloading = True  # as DynamicCache(offloading=True) does, which asks for a GPU
    return {"past_key_values": cache}


CACHES = [
    (static, "static"),
    (static_by_hand, "static"),
    (quantised, "quanti"),
    (quantised_one_by_one, "quanti"),
    (offloaded, "offload"),
]


@each_family
@each_backend
@pytest.mark.parametrize(("options", "kind"), CACHES, ids=[c[0].__name__ for c in CACHES])
def test_a_cache_that_cannot_hold_sizes_is_refused_and_prepare_inputs_named(
    family, backend, options, kind
):
    model, inputs = fresh(family), make_inputs(family)
    handle = attach(model, backend=backend)
    want = forward(model, inputs)
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        generate(model, inputs, **options(model))
    assert kind in str(caught.value).lower()
    assert "prepare_inputs" in str(caught.value)
    assert torch.equal(forward(model, inputs), want)
    handle.detach()
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))


@each_family
def test_a_static_cache_is_stocks_own_business_where_nothing_is_reduced(family):
    model, text = fresh(family), make_inputs(family, TEXT_ONLY)
    attach(model)
    got = generate(model, text, cache_implementation="static").sequences
    assert torch.equal(got, generate(stock(family), text).sequences)


@each_family
@each_backend
def test_continuous_batching_is_refused(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    handle = attach(model, backend=backend)
    errors = (ValueError, NotImplementedError, RuntimeError)
    with pytest.raises(errors, match=r"(?i)continuous batching|generate_batch"):
        model.generate_batch([[5, 6, 7]])
    handle.detach()
    assert "generate_batch" not in vars(model)
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))


@each_family
@each_backend
def test_labels_of_a_shortened_sequence_are_refused_and_others_are_not(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    attach(model, backend=backend)
    with pytest.raises((ValueError, NotImplementedError), match=r"labels.* handle\.last\.source "):
        model(**inputs, labels=inputs["input_ids"])
    text = make_inputs(family, TEXT_ONLY)
    got = model(**text, labels=text["input_ids"]).loss
    assert torch.equal(got, stock(family)(**text, labels=text["input_ids"]).loss)


@each_family
@each_backend
def test_logits_picked_by_index_are_refused_for_a_shortened_sequence(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    attach(model, backend=backend)
    want = forward(model, inputs)
    with pytest.raises((ValueError, NotImplementedError), match="logits_to_keep"):
        forward(model, inputs, logits_to_keep=torch.tensor([3, 5]))
    assert_close(forward(model, inputs, logits_to_keep=2), want[:, -2:])


@each_backend
@pytest.mark.parametrize("calibrate", ["size+distance", "size"])
def test_each_layer_has_the_distance_term_of_its_own_rope(backend, calibrate):
    model, inputs = smollm3_llava([1, 0, 1, 0]), make_inputs("llava")
    reference = Dense(model)
    with attach(model, backend=backend, calibrate=calibrate) as handle:
        out = generate(model, inputs)
    tokens, how = answers(out, inputs)[0].tolist(), Setting(distance=calibrate != "size")
    want = reference.logits(reference.prompt(inputs), handle.last.plan, 0, tokens, how)
    assert_close(logits(out)[0], want)


@each_backend
def test_a_model_without_rope_has_no_distance_term(backend):
    model, inputs = smollm3_llava([0, 0, 0, 0]), make_inputs("llava")
    said = {}
    for calibrate in ("size+distance", "size", "none"):
        with attach(model, backend=backend, calibrate=calibrate, decode_distance=True):
            said[calibrate] = logits(generate(model, inputs))
    assert torch.equal(said["size+distance"], said["size"])
    assert not torch.equal(said["size"], said["none"])


@each_backend
def test_sliding_windows_are_refused(backend):
    """A window counts tokens of the sequence as it was: a wrong answer would be the alternative."""
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    model, inputs = tiny_model("qwen2_5_vl", **window), make_inputs("qwen2_5_vl")
    want = forward(model, inputs)
    assert not torch.equal(want, forward(stock("qwen2_5_vl"), inputs))
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)sliding"):
        attach(model, backend=backend)
    assert torch.equal(forward(model, inputs), want)


@each_family
@each_backend
def test_a_reduced_cache_is_refused_by_a_model_that_is_no_longer_attached(family, backend):
    """Its sizes would be forgotten without a word."""
    model, inputs = fresh(family), make_inputs(family)
    handle = attach(model, backend=backend)
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    handle.detach()
    with pytest.raises(RuntimeError, match="attached"):
        step(model, torch.tensor([[5]]), past, inputs["input_ids"].shape[1])
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))


@each_family
@pytest.mark.parametrize("keep", [[5], [5, 6, 7]])
def test_one_budget_per_image_must_fit_the_images(family, keep):
    model, inputs = fresh(family), make_inputs(family, TWO_IMAGES)
    handle = attach(model, keep=keep)
    with pytest.raises(ValueError, match=rf"keep.*2.*{len(keep)}"):
        generate(model, inputs)
    handle.detach()
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))


@each_family
def test_placeholders_that_do_not_fit_the_images_are_an_error_as_in_stock(family):
    inputs = make_inputs(family, TWO_IMAGES)
    first = inputs["input_ids"][0].tolist().index(IMAGE)
    inputs["input_ids"][0, first] = 7
    model = fresh(family)
    attach(model)
    left = int((inputs["input_ids"] == IMAGE).sum())
    for each in (stock(family), model):
        with pytest.raises(ValueError, match=rf"tokens.*\b{left}\b"):
            forward(each, inputs)
    forward(model, make_inputs(family))


@each_family
def test_nothing_is_reported_before_anything_was_reduced(family):
    model = fresh(family)
    handle = attach(model)
    assert handle.last is None
    generate(model, make_inputs(family, TEXT_ONLY))
    assert handle.last is None
