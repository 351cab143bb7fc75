"""Gradients: the mask backend has those of the naive model, the op backend says it has none."""

import pytest
import torch
from hf_harness import assert_close, attach, each_family, forward, generate, naive, stock
from naive import Setting, image_features, window_order

from restore_ext.testing.models import TEXT_ONLY, TWO_IMAGES, make_inputs, tiny_model


def projector(model, family: str):
    return model.model.multi_modal_projector if family == "llava" else model.model.visual.merger


@each_family
@pytest.mark.parametrize("method", ["vispruner", "divprune", "tome"])
@pytest.mark.parametrize("restore", [True, False])
def test_the_mask_backend_gives_the_features_the_gradient_of_the_naive_model(
    family, method, restore
):
    inputs = make_inputs(family, TWO_IMAGES)
    model = tiny_model(family)
    handle = attach(model, backend="mask", method=method, restore=restore, positions="original")
    caught = []

    def keep(_, args, out):
        out.retain_grad()
        caught.append(out)

    projector(model, family).register_forward_hook(keep)
    model(**inputs).logits[0, -1, 7].backward()
    got = torch.cat([out.grad.flatten(0, -2) for out in caught])
    features = [f.double().requires_grad_() for f in image_features(stock(family), inputs)]
    setting = Setting() if restore else Setting(size=False, distance=False)
    full = naive(family).prompt(inputs, features)
    prompt = naive(family).reduced(full, handle.last.plan, 0, setting)
    naive(family).forward(prompt, setting)[-1, 7].backward()
    want = torch.cat([f.grad for f in features])
    if family == "qwen2_5_vl":  # the merger works window by window
        want = want[window_order(inputs["image_grid_thw"])]
    assert want.abs().max() > 1e-3
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-4 * want.abs().max().item())


@each_family
def test_every_parameter_of_the_projector_and_the_language_model_learns_with_the_mask(family):
    model = tiny_model(family)
    attach(model, backend="mask")
    model(**make_inputs(family)).logits[0, -1].square().sum().backward()
    learners = [*projector(model, family).named_parameters()]
    learners += model.model.language_model.named_parameters()
    still = [name for name, p in learners if p.grad is None or not p.grad.any()]
    assert still == []


@each_family
def test_a_step_down_the_gradient_lowers_the_loss(family):
    model, inputs = tiny_model(family), make_inputs(family)
    attach(model, backend="mask")
    target = torch.tensor([42])

    def loss():
        return torch.nn.functional.cross_entropy(model(**inputs).logits[:, -1], target)

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in projector(model, family).parameters():
            parameter -= 1e-3 * parameter.grad
    with torch.no_grad():
        assert loss() < before


@each_family
def test_gradient_checkpointing_changes_no_gradient(family):
    """It runs every layer a second time on the way back, when the forward is long over."""
    inputs, grads = make_inputs(family), []
    for checkpointing in (False, True):
        model = tiny_model(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attach(model, backend="mask")
        model(**inputs, use_cache=False).logits[0, -1].square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*grads, strict=True):
        assert torch.allclose(again, plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())


@each_family
def test_the_op_backend_says_that_it_has_no_gradient(family):
    model = tiny_model(family)
    attach(model, backend="op")
    logits = model(**make_inputs(family)).logits
    with pytest.raises(RuntimeError, match=r'no gradient.*backend="mask"'):
        logits.sum().backward()


@each_family
def test_text_alone_trains_with_the_op_backend_attached(family):
    model, inputs = tiny_model(family), make_inputs(family, TEXT_ONLY)
    attach(model, backend="op")
    plain = tiny_model(family)
    for each in (model, plain):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


@each_family
def test_train_mode_and_inference_mode_both_run(family):
    model, inputs = tiny_model(family), make_inputs(family)
    attach(model, backend="mask")
    want = forward(model, inputs)
    assert_close(model.train()(**inputs).logits, want)
    with torch.inference_mode():
        assert torch.equal(model.eval()(**inputs).logits, want)
        assert_close(generate(model, inputs).logits[0], want[:, -1])
