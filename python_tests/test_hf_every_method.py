"""Every method of list_methods() on every family of list_families(): it runs, or says why not."""

import pytest
import torch
from family_checks import model, row_inputs
from hf_harness import fingerprint, forward

import restore_ext
from restore_ext.hf.families import find_family
from restore_ext.methods import TOWER_METHODS
from restore_ext.stages import STAGE_METHODS
from restore_ext.testing.models import TINY, Picture

BY_NAME = {name: case for case in reversed(TINY) for name in [find_family(model(case)).name]}
ROWS = [(5, Picture(8, 8), 3, Picture(6, 8), 7)]
KEEP = 3


DERIVED = ("llava_onevision", "smolvlm", "qwen2_5_vl", "glm4v")  # of another adapter here
PATCH_BY_PATCH = ("llava", "paligemma")  # every patch is a token


def asked(method: str) -> dict:
    if method == "schedule":
        return {"options": {"layers": [1.0, 1.0, 0.5, 0.2]}}
    if method == "tome_vit":
        return {"keep": 20}  # its blocks get no further down
    given = {"keep": KEEP} if method not in STAGE_METHODS or STAGE_METHODS[method].budget else {}
    if method in STAGE_METHODS and "layers" in STAGE_METHODS[method].options:
        given["options"] = {"layers": [2, 3]}  # behind Qwen3-VL's DeepStack
    return given


def refused(family: str) -> set[str]:
    """The methods that make no sense there."""
    return set() if family in PATCH_BY_PATCH else set(TOWER_METHODS)


def test_there_is_a_tiny_model_of_every_family():
    assert sorted(BY_NAME) == sorted(restore_ext.list_families())


@pytest.mark.parametrize(
    ("family", "restore"),
    [
        *((family, True) for family in restore_ext.list_families()),
        *((family, False) for family in restore_ext.list_families() if family not in DERIVED),
    ],
)
def test_every_method_runs_or_is_refused_by_name(family, restore):
    case = BY_NAME[family]
    one, [inputs] = model(case), row_inputs(case, ROWS)
    want = forward(one, inputs)  # transformers installs things of its own on the first one
    before, not_here = fingerprint(one), set()
    for method in restore_ext.list_methods():
        given = {"method": method, "restore": restore, **asked(method)}
        try:
            handle = restore_ext.attach(one, **given)
        except (NotImplementedError, ValueError) as refusal:
            assert method in str(refusal) and family in str(refusal)
            not_here.add(method)
            continue
        with handle:
            got, report = forward(one, inputs), handle.last
        images, last = report.images, report.layers[-1]
        tokens = [image.tokens_before for image in images]
        assert len(images) == 2 and got.isfinite().all()
        assert got.shape[1] == last.tokens_after < want.shape[1]
        assert not torch.equal(got[:, -1], want[:, -1]), method
        if method in STAGE_METHODS:
            left = tokens
            for stage in handle.settings.stages:
                left = [stage.counts(n, m)[0] for n, m in zip(tokens, left, strict=True)]
            assert report.layers[0].visual == tokens
        else:
            keep = 1 if method == "downsample" else given["keep"]  # the largest grid within it
            left = [min(keep, n) for n in tokens]
            assert left == [image.tokens_after for image in images]
        assert last.visual == left and sum(left) < sum(tokens), method
    assert not_here == refused(family)
    assert fingerprint(one) == before and torch.equal(forward(one, inputs), want)
