"""rope_decay against what the model's own attention does to a vector of ones."""

import inspect
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel

import restore_ext
from restore_ext.testing import models

LENGTH = 150
TEXT = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {
    "llama": ("llama", {}),
    "llama with another base": ("llama", {"rope_theta": 5e5}),
    "llama stretched": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama 3 scaling": ("llama", {"rope_scaling": LLAMA_3}),
    "yarn": ("llama", {"rope_scaling": YARN}),  # multiplies cosines by an attention factor
    "stablelm turns a quarter": ("stablelm", {"partial_rotary_factor": 0.25}),
}
MROPE = {
    "qwen2_vl_text": {"rope_type": "default", "mrope_section": [4, 6, 6]},
    "qwen2_5_vl_text": {"rope_type": "default", "mrope_section": [2, 3, 11]},
    "qwen3_vl_text": {"rope_type": "default", "mrope_section": [6, 5, 5]},
    "glm4v_text": {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "partial_rotary_factor": 0.5,
    },
}


def build(kind, **options):
    """A tiny model of `kind`, as one gives it to the public interface, and its config."""
    config = CONFIG_MAPPING[kind](**TEXT | options)
    return AutoModel.from_config(config), config


def mrope(kind):
    scaling = MROPE[kind]
    factor = scaling.get("partial_rotary_factor")
    options = {} if factor is None else {"partial_rotary_factor": factor}
    return build(kind, rope_theta=10000.0, rope_scaling=dict(scaling), **options)


def turned_ones(model, position, rotary=None, *layer_type):
    """[L, L] the mean product of a vector of ones at i and at j, turned by the model's own code."""
    rotary = model.rotary_emb if rotary is None else rotary
    module = sys.modules[type(model).__module__]
    x = torch.ones(1, 1, position.shape[-1], model.config.head_dim, dtype=torch.float64)
    cosine, sine = rotary(x.float(), position, *layer_type)
    apply = getattr(module, "apply_multimodal_rotary_pos_emb", None)
    if apply is None:
        apply = module.apply_rotary_pos_emb
    sections = {}
    if "mrope_section" in inspect.signature(apply).parameters:
        sections["mrope_section"] = model.config.rope_scaling["mrope_section"]
    turned = cosine.shape[-1]  # partial RoPE leaves the rest of the head as it is
    q, k = apply(x[..., :turned], x[..., :turned], cosine.double(), sine.double(), **sections)
    return (q[0, 0] @ k[0, 0].T) / turned


def table_of(decay, position):
    """[L, L]: what calibrated_attention makes of the table."""
    distance = (position[:, :, None] - position[:, None, :]).abs()
    return sum(decay[g].double()[distance[g]] for g in range(len(decay)))


@pytest.mark.parametrize("name", PLAIN)
def test_is_what_the_model_does_to_a_vector_of_ones(name):
    kind, options = PLAIN[name]
    model, config = build(kind, **options)
    decay = restore_ext.rope_decay(model, LENGTH)
    assert decay.shape == (1, LENGTH) and decay.dtype == torch.float32
    position = torch.arange(LENGTH)[None]
    factor = getattr(model.rotary_emb, "attention_scaling", 1.0)
    expected = turned_ones(model, position) / factor**2
    torch.testing.assert_close(table_of(decay, position), expected, rtol=0, atol=1e-5)
    assert torch.equal(restore_ext.rope_decay(config, LENGTH), decay)


def test_the_attention_factor_of_yarn_is_left_out():
    model, _ = build("llama", rope_scaling=dict(YARN))
    assert model.rotary_emb.attention_scaling > 1.1
    assert restore_ext.rope_decay(model, 1).item() == 1


def test_a_frequency_of_zero_turns_nothing_and_does_not_count():
    model, _ = build("llama")
    frequency = model.rotary_emb.inv_freq
    frequency[5:] = 0  # as Gemma 4 marks what it leaves alone
    expected = torch.cos(torch.arange(9)[:, None] * frequency[:5]).mean(1)
    torch.testing.assert_close(restore_ext.rope_decay(model, 9)[0], expected)


@pytest.mark.parametrize("kind", MROPE)
def test_multimodal_rope_has_a_row_for_each_axis(kind):
    model, config = mrope(kind)
    decay = restore_ext.rope_decay(model, LENGTH)
    sections = torch.tensor(MROPE[kind]["mrope_section"])
    torch.testing.assert_close(decay[:, 0], sections / sections.sum())
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(LENGTH, (3, 40), generator=generator)
    expected = turned_ones(model, position[:, None])
    torch.testing.assert_close(table_of(decay, position), expected, rtol=0, atol=1e-5)
    assert torch.equal(restore_ext.rope_decay(config, LENGTH), decay)


def gemma3():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model, config = build("gemma3_text", num_hidden_layers=3, layer_types=types)
    return model, config, types


def test_two_ropes_are_told_apart_by_their_layer():
    model, config, types = gemma3()
    position = torch.arange(LENGTH)[None]
    seen = []
    for layer, kind in enumerate(types):
        decay = restore_ext.rope_decay(model, LENGTH, layer)
        if hasattr(model, "rotary_emb_local"):  # transformers 4
            local = model.rotary_emb_local if kind == "sliding_attention" else model.rotary_emb
            expected = turned_ones(model, position, local)
        else:
            expected = turned_ones(model, position, None, kind)
        torch.testing.assert_close(table_of(decay, position), expected, rtol=0, atol=1e-5)
        assert torch.equal(restore_ext.rope_decay(config, LENGTH, layer), decay)
        seen.append(decay)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    for given in (model, config):
        with pytest.raises(ValueError, match="layer must be given: in Gemma3TextModel, layer 1"):
            restore_ext.rope_decay(given, LENGTH)


def test_a_layer_without_rope_has_none():
    model, config = build("llama4_text", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0])
    for given in (model, config):
        assert restore_ext.rope_decay(given, 5, 0).shape == (1, 5)
        assert restore_ext.rope_decay(given, 5, 1) is None
    types = ["sliding_attention", "full_attention"]
    cohere, _ = build("cohere2", layer_types=types, sliding_window=16)
    assert restore_ext.rope_decay(cohere, 5, 0).shape == (1, 5)
    assert restore_ext.rope_decay(cohere, 5, 1) is None


def test_a_model_without_rope_has_none():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=32)
    for given in (AutoModel.from_config(config), config):
        assert restore_ext.rope_decay(given, 5) is None


@pytest.mark.parametrize("family", models.FAMILIES)
def test_takes_the_model_at_any_height(family):
    """The decoder's RoPE, not that of the vision tower."""
    model = models.tiny_model(family)
    decay = restore_ext.rope_decay(model, LENGTH)
    assert len(decay) == (1 if family == "llava" else 3)
    text = model.model.language_model
    for given in (model.model, text, model.config, text.config):
        assert torch.equal(restore_ext.rope_decay(given, LENGTH), decay)


def test_takes_a_causal_model():
    model, config = build("llama")
    causal = transformers.LlamaForCausalLM(config)
    assert torch.equal(restore_ext.rope_decay(causal, 9), restore_ext.rope_decay(model, 9))


@pytest.mark.parametrize(
    ("base", "known"),
    [
        (1e4, {0: 1, 1: 0.9702, 10: 0.6691, 64: 0.4769, 576: 0.2338, 4060: -0.1307}),
        (1e6, {1: 0.9788, 10: 0.7755, 64: 0.6250, 576: 0.4618, 1000: 0.4911}),
    ],
)
def test_has_the_values_known_for_heads_of_128(base, known):
    _, config = build("llama", head_dim=128, rope_theta=base)
    decay = restore_ext.rope_decay(config, 4096)
    for distance, value in known.items():
        assert decay[0, distance].item() == pytest.approx(value, abs=6e-5)


def test_does_not_change_the_model():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "mrope_section": [4, 6, 6]}
    model, _ = build("qwen2_5_vl_text", rope_scaling=scaling, max_position_embeddings=64)
    before = model.rotary_emb.inv_freq.clone()
    model.rotary_emb(torch.ones(1), torch.full((3, 1, 1), 999))
    stretched = model.rotary_emb.inv_freq.clone()
    assert not torch.equal(stretched, before), "a long sequence stretches the frequencies"
    decay = restore_ext.rope_decay(model, 9)
    assert torch.equal(model.rotary_emb.inv_freq, stretched)
    expected = torch.cos(torch.arange(9)[:, None] * stretched).mean(1)
    torch.testing.assert_close(decay.sum(0), expected)


def test_transformers_is_imported_only_for_a_config():
    code = "import sys, restore_ext; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_says_what_is_wrong():
    model, _ = build("llama")
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        restore_ext.rope_decay(model, 0)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"layer must be in \[0, 2\), got {layer}"):
            restore_ext.rope_decay(model, 5, layer)
    for given in ("llama", torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="must be a transformers model or config, got"):
            restore_ext.rope_decay(given, 5)
