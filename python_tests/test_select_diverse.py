"""select_diverse: each pick is the token farthest from those picked before."""

import itertools
import re

import pytest
import torch

from restore_ext import ops, reference, testing
from restore_ext.testing import tokens
from restore_ext.testing.tokens import SMALL, TokenCase

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", tokens.CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, device):
    x, k, valid = case.x(device, dtype), case.budget(device), case.valid(device)
    for op, given in ((ops.select_diverse, x), (reference.select_diverse, x.double())):
        tokens.check_select_diverse(op(given, k, valid=valid), x, k, valid=valid)


@pytest.mark.parametrize("case", tokens.TIES, ids=str)
def test_ties_go_to_the_lowest_index(case, device):
    x, k, valid = case.x(device), case.budget(device), case.valid(device)
    got = ops.select_diverse(x, k, valid=valid)
    testing.assert_same_bits(got, reference.select_diverse(x, k, valid=valid))


def test_ties_among_many_tokens(device):
    x = TokenCase(B=1, N=4500, C=5, kind="corners").x(device)
    x[0, :4200] = x[0, 0]  # whatever differs comes late
    x[0, ::5, 3] = float("nan")
    testing.assert_same_bits(ops.select_diverse(x, 14), reference.select_diverse(x, 14))


# How CUDA goes about it depends on N and B. The valid tokens are few, and lie far apart.
@pytest.mark.parametrize("B, N", [(2, 11600), (2, 16400)])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_few_of_very_many_tokens(dtype, B, N, device):
    few = torch.arange(7, N, N // 50, device=device)
    case = TokenCase(B=B, N=len(few), C=37, kind="broken")
    some = case.x(device, dtype)
    x, valid = torch.full((B, N, 37), 7.0, device=device, dtype=dtype), few.new_zeros(B, N).bool()
    x[:, few], valid[:, few] = some, True
    budget = torch.tensor([20, len(few) + 1], dtype=torch.int32, device=device)
    got = ops.select_diverse(x, budget, valid=valid, max_k=55)
    for b, k in enumerate(budget.tolist()):
        k = min(k, len(few))
        picks = torch.searchsorted(few, got[b : b + 1, :k])
        assert torch.equal(few[picks], got[b : b + 1, :k]) and (got[b, k:] == -1).all()
        tokens.check_select_diverse(picks, some[b : b + 1], k)


def test_goes_round_the_corners_of_a_square_before_it_fills_in(device):
    # 0, 1, 2, 3: four directions at right angles; 4, 5: close to 0 and to 1.
    x = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1], [1, 0.1], [0.2, 1]], device=device)
    assert ops.select_diverse(x[None], 6).tolist() == [[2, 0, 1, 3, 5, 4]]


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_starts_from_the_loner_wherever_the_others_stand(order, device):
    x = torch.tensor([[1, 0], [1, 0.1], [0, 1]], device=device)[list(order)]
    assert ops.select_diverse(x[None], 1).tolist() == [[order.index(2)]]


def test_a_token_that_cannot_be_compared_comes_last(device):
    x = TokenCase(B=1, N=9, C=8).x(device)
    x[0, [5, 2], 3] = float("nan")
    assert ops.select_diverse(x, 9)[0, 7:].tolist() == [2, 5]
    x[...] = float("inf")
    assert ops.select_diverse(x, 9).tolist() == [list(range(9))]


def test_valid_means_the_row_without_the_rest(device):
    x, valid = SMALL.x(device), TokenCase(B=3, N=29, ragged=True).valid(device)
    got = ops.select_diverse(x, 9, valid=valid)
    for b in range(len(x)):
        some = x[b : b + 1, valid[b]]
        alone = ops.select_diverse(some, min(9, some.shape[1]))
        tokens.assert_mapped_back(got[b], alone[0], valid[b])


def test_a_row_takes_its_own_budget(device):
    x, budget = SMALL.x(device), torch.tensor([-2, 3, 99], dtype=torch.int32, device=device)
    got = ops.select_diverse(x, budget, max_k=5)
    for b, k in enumerate([0, 3, 5]):
        tokens.assert_mapped_back(got[b], ops.select_diverse(x[b : b + 1], k)[0])


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, device):
    case = TokenCase(B=3, N=29, C=24, ragged=True, budgets=True)
    given = {"x": case.x(device), "k": case.budget(device), "valid": case.valid(device)}
    viewed = testing.view_all(view, given)
    testing.assert_same_bits(ops.select_diverse(**viewed), ops.select_diverse(**given))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    x = TokenCase(N=400, C=256).x(device)
    testing.assert_same_bits_every_run(lambda: ops.select_diverse(x, 20))


@pytest.mark.parametrize("ragged", [False, True])
def test_is_a_well_formed_operator(ragged, device):
    case = TokenCase(B=2, N=20, C=8, ragged=ragged, budgets=ragged)
    budget = case.budget(device) if ragged else None
    torch.library.opcheck(
        torch.ops.restore_ext.select_diverse.default,
        (case.x(device), 5, budget, case.valid(device)),
    )


def test_compiles(device):
    cases = [TokenCase(B=b, N=n, k=k, C=8) for b, n, k in ((2, 20, 5), (3, 33, 9))]
    testing.assert_compiles(
        lambda x, k: ops.select_diverse(x, k), *[(case.x(device), case.k) for case in cases]
    )
    cases = [TokenCase(B=b, N=n, C=8, ragged=True, budgets=True) for b, n in ((2, 20), (3, 33))]
    testing.assert_compiles(
        lambda x, k, valid: ops.select_diverse(x, k, valid=valid),
        *[(case.x(device), case.budget(device), case.valid(device)) for case in cases],
    )


SPOILED = {
    "x must have 3 dimensions, got shape [20, 8]": lambda x: {"x": x[0], "k": 5},
    "x must be Float, Half or BFloat16, got Double": lambda x: {"x": x.double(), "k": 5},
    "k must be in [0, N] = [0, 20], got 21": lambda x: {"x": x, "k": 21},
    "k must be in [0, N] = [0, 20], got -1": lambda x: {"x": x, "k": -1},
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
    with pytest.raises(RuntimeError, match=f"^{re.escape('select_diverse: ' + message)}$"):
        ops.select_diverse(**spoiled)


def test_takes_no_part_in_a_gradient(device):
    assert not ops.select_diverse(SMALL.x(device).requires_grad_(), 3).requires_grad
