"""score_anchors: does a token stand for many others, and differ from those that stand for more?"""

import re

import pytest
import torch

from restore_ext import ops, reference, testing
from restore_ext.testing import tokens
from restore_ext.testing.tokens import SMALL, TokenCase

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
MODES = ["paper", "official"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", tokens.CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, mode, device):
    x, valid = case.x(device, dtype), case.valid(device)
    for op, given in ((ops.score_anchors, x), (reference.score_anchors, x.double())):
        score = op(given, mode=mode, valid=valid)
        tokens.check_score_anchors(score.float(), x, mode=mode, valid=valid)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", tokens.TIES, ids=str)
def test_equal_densities_are_no_rivals(case, mode, device):
    x, valid = case.x(device), case.valid(device)
    got = ops.score_anchors(x, mode=mode, valid=valid)
    testing.assert_same_bits(got, reference.score_anchors(x, mode=mode, valid=valid))


@pytest.mark.parametrize("mode", MODES)
def test_ties_among_many_tokens(mode, device):
    x = TokenCase(B=2, N=1100, C=12, kind="corners").x(device)
    x[1, ::7, 3] = float("nan")
    got = ops.score_anchors(x, mode=mode)
    testing.assert_same_bits(got, reference.score_anchors(x, mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_a_token_score_the_same_bits(mode, device):
    case = TokenCase(B=1, N=24, C=100)
    copied = case.x(device).repeat(1, 5, 1)
    score = ops.score_anchors(copied, mode=mode).view(5, 24)
    assert (score == score[0]).all()


def test_modes_look_at_opposite_rivals(device):
    # Three alike and one apart: in "paper" the loner is far from the dense ones, in "official" it
    # has no rival, while the three have it for one.
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]], device=device)
    density = torch.tensor([3.6, 3.6, 3.6, 2.8])
    for mode, factor in (("paper", [1, 1, 1, 0.4]), ("official", [0.4, 0.4, 0.4, 1])):
        expected = density * torch.tensor(factor)
        torch.testing.assert_close(ops.score_anchors(x, mode=mode)[0].cpu(), expected)


@pytest.mark.parametrize("N", [29, 200])
@pytest.mark.parametrize("mode", MODES)
def test_valid_means_the_row_without_the_rest(mode, N, device):
    case = TokenCase(B=3, N=N, C=24, ragged=True)
    x, valid = case.x(device), case.valid(device)
    got = ops.score_anchors(x, mode=mode, valid=valid)
    for b in range(len(x)):
        alone = ops.score_anchors(x[b : b + 1, valid[b]], mode=mode)[0]
        testing.assert_same_bits(got[b, valid[b]], alone)
        assert (got[b, ~valid[b]] == tokens.NEVER).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_one_color_has_no_rivals(mode, device):
    x = TokenCase(B=1, N=1, C=131).x(device).expand(2, 150, 131)
    score = ops.score_anchors(x, mode=mode)
    assert (score == score[0, 0]).all()
    torch.testing.assert_close(score[0, 0].item(), 150.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, device):
    case = TokenCase(B=3, N=29, C=24, ragged=True)
    given = {"x": case.x(device), "valid": case.valid(device)}
    viewed = testing.view_all(view, given)
    testing.assert_same_bits(ops.score_anchors(**viewed), ops.score_anchors(**given))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    x = TokenCase(N=400, C=256).x(device)
    testing.assert_same_bits_every_run(lambda: ops.score_anchors(x))


@pytest.mark.parametrize("ragged", [False, True])
def test_is_a_well_formed_operator(ragged, device):
    case = TokenCase(B=2, N=20, C=8, ragged=ragged)
    torch.library.opcheck(
        torch.ops.restore_ext.score_anchors.default, (case.x(device), "paper", case.valid(device))
    )


def test_compiles(device):
    cases = [TokenCase(B=b, N=n, C=8, ragged=True) for b, n in ((2, 20), (3, 33))]
    testing.assert_compiles(
        lambda x, valid: ops.score_anchors(x, mode="official", valid=valid),
        *[(case.x(device), case.valid(device)) for case in cases],
    )


SPOILED = {
    "x must have 3 dimensions, got shape [20, 8]": lambda x: {"x": x[0]},
    "x must be Float, Half or BFloat16, got Long": lambda x: {"x": x.long()},
    'mode must be "paper" or "official", got "Paper"': lambda x: {"x": x, "mode": "Paper"},
    "valid must have shape [B, N] = [2, 20], got [2, 20, 8]": lambda x: {"x": x, "valid": x > 0},
    "valid must be Bool, got Float": lambda x: {"x": x, "valid": x[..., 0]},
}


@pytest.mark.parametrize("message", SPOILED)
def test_says_what_is_wrong(message, device):
    spoiled = SPOILED[message](TokenCase(B=2, N=20, C=8).x(device))
    with pytest.raises(RuntimeError, match=f"^{re.escape('score_anchors: ' + message)}$"):
        ops.score_anchors(**spoiled)


def test_refuses_a_gradient(device):
    score = ops.score_anchors(SMALL.x(device).requires_grad_())
    with pytest.raises(RuntimeError, match="score_anchors has no gradient: it is for inference"):
        score.sum().backward()
