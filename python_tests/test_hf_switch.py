"""Handle.switch(): as attach() anew, on a model that stays attached."""

import pytest
import torch
from hf_harness import attach, fingerprint, forward, fresh

import restore_ext
from restore_ext import list_methods
from restore_ext.methods import find_card
from restore_ext.testing.models import make_inputs, tiny_model

METHODS = [name for name in list_methods() if name != "schedule"]
FEW = {"tome_vit": 20}  # of 64; it cannot get below 16


def options(method):
    return {"method": method, "keep": FEW.get(method, 9) if find_card(method).budget else None}


@pytest.fixture(scope="module")
def inputs():
    return make_inputs("llava")


@pytest.mark.parametrize("restore", [True, False])
def test_every_switch_gives_what_attach_gives(inputs, restore):
    switched, anew = fresh("llava"), fresh("llava")
    handle = restore_ext.attach(switched, method="divprune", keep=5)
    results = []
    for method in [*METHODS, *reversed(METHODS)]:
        handle.switch(handle.variant(restore=restore, **options(method)))
        got = forward(switched, inputs)
        wanted = restore_ext.attach(anew, restore=restore, **options(method))
        assert torch.equal(got, forward(anew, inputs)), method
        assert handle.settings.method == wanted.settings.method
        assert handle.settings.keep == wanted.settings.keep
        results.append(got)
    assert len({str(result) for result in results}) > len(METHODS) // 2, "they tell apart"


def test_nothing_is_left_behind(inputs):
    model = fresh("llava")
    before, stock = fingerprint(model), forward(model, inputs)
    handle = attach(model)
    for method in METHODS:
        handle.switch(handle.variant(keep_ratio=None, **options(method)))
    forward(model, inputs)
    handle.detach()
    assert fingerprint(model) == before
    assert torch.equal(forward(model, inputs), stock)
    with pytest.raises(RuntimeError, match="detached"):
        handle.switch(handle.variant(keep_ratio=0.5))


def test_what_cannot_be_switched_to_changes_nothing(inputs):
    model = fresh("llava")
    handle = restore_ext.attach(model, method="vispruner", keep=9)
    settings, attached, got = handle.settings, fingerprint(model), forward(model, inputs)
    variant = handle.variant(method="tome_vit", keep=15)
    with pytest.raises(ValueError, match="keep must be at least 16"):
        handle.switch(variant)
    assert handle.settings is settings and fingerprint(model) == attached
    assert torch.equal(forward(model, inputs), got)


def test_a_method_that_does_not_fit_the_family_is_refused():
    handle = restore_ext.attach(tiny_model("qwen2_5_vl"), method="divprune", keep=4)
    variant = handle.variant(method="downsample")
    with pytest.raises(NotImplementedError, match="method downsample needs a token of every patch"):
        handle.switch(variant)
    assert handle.settings.method == "divprune"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budgets": 3}, TypeError, "changes must be options of attach.*got budgets"),
        ({"enabled": False}, TypeError, "got enabled"),
        ({"method": "best"}, ValueError, "method must be one of .*got 'best'"),
        ({"keep": 0}, ValueError, "keep must be .*got 0"),
        ({"restore": 1}, TypeError, "restore"),
    ],
)
def test_variants_are_checked_as_attach_checks(changes, error, message):
    handle = restore_ext.attach(tiny_model("llava"), keep=9)
    with pytest.raises(error, match=message):
        handle.variant(**changes)


def test_the_backend_stays_unless_it_is_asked_for():
    model = tiny_model("llava")
    handle = restore_ext.attach(model, keep=9, backend="mask")
    assert handle.variant(keep=4).backend == "mask"
    handle.switch(handle.variant(backend="op"))
    assert handle.settings.backend == "op" and handle.variant().backend == "mask"
    model = tiny_model("llava", attn="eager").double()
    with pytest.warns(UserWarning, match="falls back to backend='mask'"):
        handle = restore_ext.attach(model, keep=9)
    assert handle.options["backend"] == "op" and handle.variant(keep=4).backend == "mask"
