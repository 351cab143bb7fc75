"""A model whose linear layers have 8-bit weights, by torchao or bitsandbytes, is attached as any
other.

What is right is the quantised model itself, without a cache and without a hook of ours (dense.py).
"""

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
import transformers
from dense import Dense
from hf_harness import answers, fingerprint, forward, generate, logits, stock
from naive import Setting
from naive_stages import cuts_of, setting_of

import restore_ext
from restore_ext.testing.models import (
    RAGGED,
    TEXT_ONLY,
    VERSION,
    join_rows,
    make_inputs,
    tiny_model,
)

CUTS = {
    "behind the projector": {"method": "vispruner", "keep_ratio": 0.3},
    "one cut": {"method": "fastv", "keep": 9},
    "two cuts": {
        "method": "visionzip",
        "keep": 20,
        "schedule": {"method": "pyramiddrop", "layers": [1, 3], "ratios": [0.5, 0.2]},
    },
    "drop all": {"method": "vtw"},
}


@dataclass(frozen=True)
class Kind:
    """How linear layers are quantised.

    tolerance  of the norm of the logits. Where activations are rounded too, the last bit of an
               input decides which way, and stock is no closer to itself in another batch: 0.02 for
               a forward. A wrong size, position or cut is 0.18 or more
    """

    package: str
    weight: str  # the class of the weights
    tolerance: float

    def config(self, name: str):
        if self.package == "bitsandbytes":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        from torchao import quantization

        return transformers.TorchAoConfig(getattr(quantization, name)())


KINDS = {
    "Int8WeightOnlyConfig": Kind("torchao", "Int8Tensor", 1e-5),
    "Int8DynamicActivationInt8WeightConfig": Kind("torchao", "Int8Tensor", 0.08),
    "LLM.int8()": Kind("bitsandbytes", "Int8Params", 0.08),
}


def load(path, **options):
    cls = transformers.LlavaForConditionalGeneration
    return cls.from_pretrained(path, device_map="cpu", **options)


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, tmp_path_factory):
    kind, path = KINDS[request.param], tmp_path_factory.mktemp("float")
    if find_spec(kind.package) is None:
        pytest.skip(f"needs {kind.package}: pip install {kind.package}")
    tiny_model("llava").save_pretrained(path)
    return kind, load(path, quantization_config=kind.config(request.param))


def rows() -> list[dict]:
    return [make_inputs("llava", [row], seed=seed) for seed, row in enumerate(RAGGED)]


def test_all_linear_layers_of_both_towers_are_quantized(quantized):
    kind, model = quantized
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert len(linear) > 40 and {type(one.weight).__name__ for one in linear} == {kind.weight}
    inputs = join_rows(rows())
    assert not torch.equal(forward(model, inputs), forward(stock("llava"), inputs))


@pytest.mark.parametrize("cut", CUTS)
def test_cached_generation_of_a_ragged_batch_is_the_reference(quantized, cut):
    kind, model = quantized
    alone, backend = rows(), "mask" if cut == "two cuts" else "op"
    with restore_ext.attach(model, backend=backend, **CUTS[cut]) as handle:
        assert handle.settings.backend == backend  # op is not fallen back from
        out = generate(model, join_rows(alone), max_new_tokens=2)
    dense = Dense(model, dtype=model.dtype)
    tokens = answers(out, join_rows(alone))
    for row, inputs in enumerate(alone):
        want = dense.logits(
            dense.prompt(inputs),
            handle.last.plan,
            row,
            tokens[row].tolist(),
            Setting(**setting_of(handle)),
            cuts_of(handle, row),
        )
        assert (logits(out)[row] - want).norm() <= kind.tolerance * want.norm()
    assert len(handle.last.stages) == len(handle.settings.stages)


def test_off_text_alone_and_detached_are_the_same_bits(quantized):
    _, model = quantized
    inputs, text = join_rows(rows()), make_inputs("llava", TEXT_ONLY)
    want, want_text, before = forward(model, inputs), forward(model, text), fingerprint(model)
    for cut in ("two cuts", "drop all"):
        with restore_ext.attach(model, **CUTS[cut]) as handle:
            assert not torch.equal(forward(model, inputs)[:, -1], want[:, -1])
            assert torch.equal(forward(model, text), want_text)
            handle.enabled = False
            assert torch.equal(forward(model, inputs), want)
        assert torch.equal(forward(model, inputs), want)
        assert fingerprint(model) == before


def test_a_checkpoint_saved_while_attached_is_the_quantized_model(quantized, tmp_path):
    kind, model = quantized
    inputs = join_rows(rows())
    want = forward(model, inputs)
    with restore_ext.attach(model, **CUTS["two cuts"]):
        reduced = forward(model, inputs)
        if kind.package == "torchao" and VERSION < (5, 0):  # attached or not
            with pytest.raises(ValueError, match="not serializable"):
                model.save_pretrained(tmp_path)
            return
        model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.language_model.layers[1].mlp.up_proj.weight).__name__ == kind.weight
    assert torch.equal(forward(again, inputs), want)
    with restore_ext.attach(again, **CUTS["two cuts"]):
        assert torch.equal(forward(again, inputs), reduced)
