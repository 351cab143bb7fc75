"""select_anchors: the tokens of the highest anchor score, in ascending order."""

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
    x, k, valid = case.x(device, dtype), case.budget(device), case.valid(device)
    for op, given in ((ops.select_anchors, x), (reference.select_anchors, x.double())):
        anchors = op(given, k, mode=mode, valid=valid)
        tokens.check_select_anchors(anchors, x, k, mode=mode, valid=valid)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", tokens.TIES, ids=str)
def test_ties_go_to_the_lowest_index(case, mode, device):
    x, k, valid = case.x(device), case.budget(device), case.valid(device)
    got = ops.select_anchors(x, k, mode=mode, valid=valid)
    testing.assert_same_bits(got, reference.select_anchors(x, k, mode=mode, valid=valid))


@pytest.mark.parametrize("k", [1, 700, 1900, 2100])
def test_ties_among_many_tokens(k, device):
    x = TokenCase(B=1, N=2100, C=5, kind="corners").x(device)
    x[0, ::5, 3] = float("nan")
    testing.assert_same_bits(ops.select_anchors(x, k), reference.select_anchors(x, k))


@pytest.mark.parametrize("k", [1, 33, 1024, 2099])
def test_the_highest_of_many_scores(k, device):
    x = TokenCase(B=1, N=2100, C=4).x(device)
    got, score = ops.select_anchors(x, k)[0], ops.score_anchors(x)[0]
    testing.assert_same_bits(
        got, score.sort(descending=True, stable=True).indices[:k].sort().values
    )


def test_a_token_that_cannot_be_compared_comes_last(device):
    x = TokenCase(B=1, N=9, C=8).x(device)
    x[0, [2, 5], 3] = float("nan")
    assert ops.select_anchors(x, 7).tolist() == [[0, 1, 3, 4, 6, 7, 8]]
    assert ops.select_anchors(x, 8).tolist() == [[0, 1, 2, 3, 4, 6, 7, 8]]


@pytest.mark.parametrize("mode", MODES)
def test_valid_means_the_row_without_the_rest(mode, device):
    x, valid = SMALL.x(device), TokenCase(B=3, N=29, ragged=True).valid(device)
    got = ops.select_anchors(x, 9, mode=mode, valid=valid)
    for b in range(len(x)):
        some = x[b : b + 1, valid[b]]
        alone = ops.select_anchors(some, min(9, some.shape[1]), mode=mode)
        tokens.assert_mapped_back(got[b], alone[0], valid[b])


def test_a_row_takes_its_own_budget(device):
    x, budget = SMALL.x(device), torch.tensor([-2, 3, 99], dtype=torch.int32, device=device)
    got = ops.select_anchors(x, budget, max_k=5)
    for b, k in enumerate([0, 3, 5]):
        tokens.assert_mapped_back(got[b], ops.select_anchors(x[b : b + 1], k)[0])


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, device):
    case = TokenCase(B=3, N=29, C=24, ragged=True, budgets=True)
    given = {"x": case.x(device), "k": case.budget(device), "valid": case.valid(device)}
    viewed = testing.view_all(view, given)
    testing.assert_same_bits(ops.select_anchors(**viewed), ops.select_anchors(**given))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    x = TokenCase(N=400, C=256).x(device)
    testing.assert_same_bits_every_run(lambda: ops.select_anchors(x, 100))


@pytest.mark.parametrize("ragged", [False, True])
def test_is_a_well_formed_operator(ragged, device):
    case = TokenCase(B=2, N=20, C=8, ragged=ragged, budgets=ragged)
    budget = case.budget(device) if ragged else None
    torch.library.opcheck(
        torch.ops.restore_ext.select_anchors.default,
        (case.x(device), 5, budget, "paper", case.valid(device)),
    )


def test_compiles(device):
    cases = [TokenCase(B=b, N=n, k=k, C=8) for b, n, k in ((2, 20, 5), (3, 33, 9))]
    testing.assert_compiles(
        lambda x, k: ops.select_anchors(x, k), *[(case.x(device), case.k) for case in cases]
    )
    cases = [TokenCase(B=b, N=n, C=8, ragged=True, budgets=True) for b, n in ((2, 20), (3, 33))]
    testing.assert_compiles(
        lambda x, k, valid: ops.select_anchors(x, k, valid=valid),
        *[(case.x(device), case.budget(device), case.valid(device)) for case in cases],
    )


SPOILED = {
    "x must have 3 dimensions, got shape [20, 8]": lambda x: {"x": x[0], "k": 5},
    "x must be Float, Half or BFloat16, got Double": lambda x: {"x": x.double(), "k": 5},
    "k must be in [0, N] = [0, 20], got 21": lambda x: {"x": x, "k": 21},
    "k must be in [0, N] = [0, 20], got -1": lambda x: {"x": x, "k": -1},
    'mode must be "paper" or "official", got ""': lambda x: {"x": x, "k": 5, "mode": ""},
    "budget must have shape [B] = [2], got [20]": lambda x: {"x": x, "k": x[0, :, 0].int()},
    "budget must be Int, got Float": lambda x: {"x": x, "k": x[:, 0, 0]},
    "valid must have shape [B, N] = [2, 20], got [2, 8]": lambda x: {
        "x": x,
        "k": 5,
        "valid": x[:, 0] > 0,
    },
    "valid must be Bool, got Float": lambda x: {"x": x, "k": 5, "valid": x[..., 0]},
}


@pytest.mark.parametrize("message", SPOILED)
def test_says_what_is_wrong(message, device):
    spoiled = SPOILED[message](TokenCase(B=2, N=20, C=8).x(device))
    with pytest.raises(RuntimeError, match=f"^{re.escape('select_anchors: ' + message)}$"):
        ops.select_anchors(**spoiled)


def test_takes_no_part_in_a_gradient(device):
    assert not ops.select_anchors(SMALL.x(device).requires_grad_(), 3).requires_grad
