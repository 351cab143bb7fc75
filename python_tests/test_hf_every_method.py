"""Every method of list_methods() on every family of list_families(): it runs, or says why not."""

import pytest
import torch
from family_checks import model, row_inputs
from hf_harness import fingerprint, forward

import restore_ext
from restore_ext.hf.families import find_family
from restore_ext.methods import METHODS, TOWER_METHODS
from restore_ext.stages import STAGE_METHODS
from restore_ext.testing.models import TINY, Picture

BY_NAME = {name: case for case in reversed(TINY) for name in [find_family(model(case)).name]}
ROWS = [(5, Picture(8, 8), 3, Picture(6, 8), 7)]
KEEP = 3


def asked(method: str) -> dict:
    if method == "schedule":
        return {"options": {"layers": [1.0, 1.0, 0.5, 0.2]}}
    takes_budget = method not in STAGE_METHODS or STAGE_METHODS[method].budget
    return {"keep": KEEP} if takes_budget else {}


def test_there_is_a_tiny_model_of_every_family():
    assert sorted(BY_NAME) == sorted(restore_ext.list_families())


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("family", restore_ext.list_families())
def test_every_method_runs_or_is_refused_by_name(family, restore):
    case = BY_NAME[family]
    one, [inputs] = model(case), row_inputs(case, ROWS)
    want = forward(one, inputs)  # transformers installs things of its own on the first one
    before = fingerprint(one)
    ran = []
    for method in restore_ext.list_methods():
        try:
            handle = restore_ext.attach(one, method=method, restore=restore, **asked(method))
        except NotImplementedError as refusal:
            assert method in str(refusal) and family in str(refusal)
            assert method in TOWER_METHODS and family != "llava"
            continue
        with handle:
            got, report = forward(one, inputs), handle.last
        ran.append(method)
        images, last = report.images, report.layers[-1]
        assert len(images) == 2 and got.isfinite().all()
        assert got.shape[1] == last.tokens_after < want.shape[1]
        assert not torch.equal(got[:, -1], want[:, -1]), method
        if method in STAGE_METHODS:
            first = [image.tokens_before for image in images]
            assert report.layers[0].visual == first
            now = first
            for stage in handle.settings.stages:
                now = [stage.counts(n, m)[0] for n, m in zip(first, now, strict=True)]
            assert last.visual == now and sum(now) < sum(first)
        else:
            left = [min(KEEP, image.tokens_before) for image in images]
            # The largest grid within the budget.
            left = [1, 1] if method == "downsample" else left
            assert last.visual == left == [image.tokens_after for image in images]
    missing = set(restore_ext.list_methods()) - set(ran)
    assert missing == (set() if family == "llava" else set(TOWER_METHODS))
    assert {*METHODS, *STAGE_METHODS} <= set(ran)
    assert fingerprint(one) == before and torch.equal(forward(one, inputs), want)
