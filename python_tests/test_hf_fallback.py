"""Where the attention operator cannot serve a model, the mask does, and one warning says why.

There is no GPU here: stand-ins say there were one.
"""

import warnings

import pytest
import torch
from hf_harness import assert_close, attach, each_family, forward, fresh

from restore_ext import checks
from restore_ext.hf import images
from restore_ext.testing.models import make_inputs, tiny_model

GPU = torch.device("cuda", 1)
FALLS_BACK = r"^backend='op' falls back to backend='mask': "


class OnOne:
    """The `device` of every tensor, but that of one."""

    def __init__(self, tensor, device):
        self.tensor, self.other = tensor, device

    def __get__(self, tensor, kind=None):
        return self.other if tensor is self.tensor else torch.Tensor.device.__get__(tensor)


@pytest.fixture
def on_gpu(monkeypatch):
    """Says that a parameter is on a GPU, while a model is attached."""

    def attach_there(model, part="", **options):
        parameter = next(model.get_submodule(part).parameters())
        with monkeypatch.context() as patch:
            patch.setattr(type(parameter), "device", OnOne(parameter, GPU), raising=False)
            return attach(model, **options)

    return attach_there


def masked(family):
    """What the mask says of the same model."""
    model = fresh(family)
    with attach(model, backend="mask"):
        return forward(model, make_inputs(family))


@each_family
@pytest.mark.parametrize("part", ["", "model.language_model.layers.3", "lm_head"])
def test_a_device_without_kernels(family, part, on_gpu, monkeypatch):
    monkeypatch.setattr(checks, "DEVICE_TYPES", ("cpu", "meta"))
    model = fresh(family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with on_gpu(model, part) as handle:
            assert handle.settings.backend == "mask"
            got = [forward(model, make_inputs(family)) for _ in range(2)]
    assert all(torch.equal(one, masked(family)) for one in got)
    mine = [w for w in caught if "restore_ext" in str(w.message)]
    (warning,) = mine
    assert str(warning.message).endswith("this build of restore_ext has no kernels for cuda")


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        ((7, 5), "the kernels need .* 8.0 .* this is 7.5"),
        ((8, 0), ""),
        ((10, 0), "this build of restore_ext is for 8.0 9.0a, this GPU is 10.0"),
    ],
)
def test_a_gpu_that_runs_none_of_the_code(capability, why, on_gpu, monkeypatch):
    monkeypatch.setattr(checks, "DEVICE_TYPES", ("cpu", "meta", "cuda"))
    monkeypatch.setattr(checks._C, "cuda_archs", "8.0 9.0a")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = fresh("llava")
    if not why:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert on_gpu(model).settings.backend == "op"
        return
    with pytest.warns(UserWarning, match=FALLS_BACK + why + "$"):
        assert on_gpu(model).settings.backend == "mask"
    with pytest.raises(NotImplementedError, match=f"^x must be on the CPU: {why}, got"):
        checks.require_kernels("x", GPU)


def test_a_dtype_the_op_does_not_have():
    inputs = make_inputs("llava")
    double = fresh("llava").double()
    inputs64 = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    with pytest.warns(UserWarning, match=FALLS_BACK + ".*float32.* the model is in torch.float64$"):
        handle = attach(double)
    got = forward(double, inputs64)
    assert got.dtype == torch.float64 and handle.last is not None
    assert_close(got.float(), masked("llava"))


def test_a_head_size_the_op_does_not_have():
    model, inputs = tiny_model("llava", head_dim=20), make_inputs("llava")
    with pytest.warns(UserWarning, match=FALLS_BACK + "the op needs a head size .* got 20$"):
        handle = attach(model)
    assert handle.settings.backend == "mask"
    assert forward(model, inputs).isfinite().all() and handle.last is not None


def test_attention_with_sinks_which_the_op_does_not_have():
    """As GPT-OSS in an InternVL 3.5."""
    model = fresh("llava")
    model.model.language_model.layers[2].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.warns(UserWarning, match=FALLS_BACK + "the op has no attention sinks$"):
        assert attach(model).settings.backend == "mask"


def test_a_mask_that_was_asked_for_is_no_fallback(on_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_gpu(fresh("llava"), backend="mask").settings.backend == "mask"


def test_attention_that_takes_no_mask_is_refused_with_what_helps():
    model = tiny_model("llava", head_dim=20)
    model.config.text_config._attn_implementation = "flash_attention_2"
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="sdpa"):
        attach(model)


@each_family
def test_without_kernels_tokens_are_reduced_on_the_cpu(family, monkeypatch):
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(images, "why_no_kernels", lambda device: "a stand-in")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x.shape) or cpu(x))
    model = fresh(family)
    with attach(model, backend="mask"):
        got = forward(model, make_inputs(family))
    assert moved and torch.equal(got, masked(family))
