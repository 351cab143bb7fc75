"""An attached model among others: copies, files, threads, neighbours."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from hf_harness import (
    answers,
    assert_is_naive,
    attach,
    each_backend,
    each_family,
    fingerprint,
    forward,
    fresh,
    generate,
    logits,
)

from restore_ext.testing.models import (
    FAMILIES,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    VERSION,
    make_inputs,
    tiny_model,
)


def by_deepcopy(model, _):
    return copy.deepcopy(model)


def by_pickle(model, _):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model, _):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_save_pretrained(model, folder):
    model.save_pretrained(folder)
    twin = type(model).from_pretrained(folder)
    twin.generation_config = copy.deepcopy(model.generation_config)  # files leave out eos = None
    return twin


@each_family
@each_backend
@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_torch_save, by_save_pretrained])
def test_a_copy_of_an_attached_model_is_a_stock_model(family, backend, duplicate, tmp_path):
    inputs, pickled = make_inputs(family), duplicate in (by_pickle, by_torch_save)
    # Since 5.0 stock itself cannot be pickled once it has run.
    model = tiny_model(family) if pickled else fresh(family)
    handle = attach(model, backend=backend)
    if not pickled:
        generate(model, inputs)
    hooked = fingerprint(model)
    twin = duplicate(model, tmp_path / "attached")
    assert fingerprint(model) == hooked
    # Weights read from a file lie otherwise in memory, which can change the last bit: so stock's
    # are read from a file, too.
    plain = duplicate(tiny_model(family), tmp_path / "stock")
    assert fingerprint(twin).keys() == fingerprint(plain).keys()
    want = forward(plain, inputs)
    assert torch.equal(forward(twin, inputs), want)
    assert torch.equal(logits(generate(twin, inputs)), logits(generate(plain, inputs)))
    assert_is_naive(family, inputs, handle, generate(model, inputs))
    handle.detach()
    assert torch.equal(forward(twin, inputs), want)


@each_family
@each_backend
@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
def test_a_copy_carries_nothing_of_the_hook(family, backend, duplicate):
    model = tiny_model(family)
    attach(model, backend=backend)
    assert fingerprint(duplicate(model, None)) == fingerprint(tiny_model(family))


@each_family
@each_backend
def test_the_saved_files_of_an_attached_model_are_those_of_a_stock_one(family, backend, tmp_path):
    model = fresh(family)
    attach(model, backend=backend)
    generate(model, make_inputs(family))
    model.save_pretrained(tmp_path / "attached")
    fresh(family).save_pretrained(tmp_path / "stock")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "attached").iterdir()) == names
    for name in names:
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("attached", "stock"))
        assert one == other, name


@each_family
def test_a_copy_can_be_attached_on_its_own(family):
    model, inputs = fresh(family), make_inputs(family)
    attach(model, keep_ratio=0.5)
    want = logits(generate(model, inputs))
    twin = copy.deepcopy(model)
    handle = attach(twin)
    assert_is_naive(family, inputs, handle, generate(twin, inputs))
    assert torch.equal(logits(generate(model, inputs)), want)


@each_family
@each_backend
def test_a_checkpoint_folder_loads_and_reduces(family, backend, tmp_path):
    fresh(family).save_pretrained(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    model.generation_config = fresh(family).generation_config
    inputs = make_inputs(family, RAGGED)
    handle = attach(model, backend=backend)
    assert_is_naive(family, inputs, handle, generate(model, inputs))


@each_backend
def test_two_attached_models_keep_to_themselves(backend):
    models = {family: fresh(family) for family in ("llava", "qwen2_5_vl")}
    other = tiny_model("llava", seed=1)
    inputs = {family: make_inputs(family, TWO_IMAGES) for family in models}
    handles = {f: attach(m, backend=backend) for f, m in models.items()}
    another = attach(other, backend=backend, keep=7, method="divprune", layer0="size")
    outputs = {family: generate(models[family], inputs[family]) for family in models}
    seven = generate(other, inputs["llava"])
    for family, out in outputs.items():
        assert_is_naive(family, inputs[family], handles[family], out)
    assert [image.tokens_after for image in another.last.images] == [7, 7]
    another.detach()
    again = generate(models["llava"], inputs["llava"])
    assert torch.equal(again.sequences, outputs["llava"].sequences)
    assert not torch.equal(logits(generate(other, inputs["llava"])), logits(seven))


# Before 5.0 stock Qwen2.5-VL keeps the place of the prompt in the model while it decodes.
@pytest.mark.parametrize("family", FAMILIES if VERSION >= (5, 0) else ["llava"])
@each_backend
def test_threads_may_share_an_attached_model(family, backend):
    model = fresh(family)
    attach(model, backend=backend)
    jobs = [
        make_inputs(family, rows, seed=seed)
        for seed in range(2)
        for rows in (ONE_IMAGE, TEXT_ONLY, RAGGED, TWO_IMAGES)
    ]
    wanted = [logits(generate(model, inputs)) for inputs in jobs]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(generate, model, inputs) for inputs in jobs]
        outputs = [future.result() for future in futures]
    for inputs, out, want in zip(jobs, outputs, wanted, strict=True):
        assert torch.equal(answers(out, inputs), want.argmax(-1))
        assert torch.allclose(logits(out), want, rtol=0, atol=1e-4)


@each_family
@each_backend
def test_the_models_own_parameters_and_buffers_are_left_alone(family, backend):
    model = fresh(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, backend=backend)
    generate(model, make_inputs(family))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@each_family
@each_backend
def test_users_own_hooks_survive(family, backend):
    model, inputs = fresh(family), make_inputs(family)
    seen = []
    model.model.language_model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    handle = attach(model, backend=backend)
    forward(model, inputs)
    handle.detach()
    forward(model, inputs)
    assert seen == [1, 1]
