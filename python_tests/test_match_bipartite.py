"""match_bipartite: even tokens find their most similar odd partners, the best pairs are taken."""

import re

import pytest
import torch

from restore_ext import ops, reference, testing
from restore_ext.testing import tokens
from restore_ext.testing.tokens import SMALL, TokenCase

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", tokens.CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, class_token, device):
    x, r = case.x(device, dtype), case.budget(device)
    options = {"valid": case.valid(device), "class_token": class_token}
    for result in (
        ops.match_bipartite(x, r, **options),
        reference.match_bipartite(x.double(), r, **options),
    ):
        tokens.check_match_bipartite(result, x, r, **options)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("case", tokens.TIES, ids=str)
def test_ties_go_to_the_lowest_index(case, class_token, device):
    options = {"valid": case.valid(device), "class_token": class_token}
    got = ops.match_bipartite(case.x(device), case.budget(device), **options)
    testing.assert_same_bits(
        got, reference.match_bipartite(case.x(device), case.budget(device), **options)
    )


@pytest.mark.parametrize("class_token", [False, True])
def test_many_tokens(class_token, device):
    case = TokenCase(B=2, N=3200, k=900, C=9, ragged=True)  # more than a block of threads or a tile
    x, valid = case.x(device), case.valid(device)
    result = ops.match_bipartite(x, case.k, valid=valid, class_token=class_token)
    tokens.check_match_bipartite(result, x, case.k, valid=valid, class_token=class_token)


def test_a_token_that_cannot_be_compared_is_the_last_choice(device):
    x = torch.tensor([[1.0], [float("nan")], [1.0], [-1.0], [float("inf")], [-1.0]], device=device)
    for r in range(4):  # even its opposite is more similar to a token
        unmerged, src, dst = ops.match_bipartite(x[None], r)
        assert src.tolist() == [[0, 2, 4][:r]] and unmerged.tolist() == [[0, 2, 4][r:]]
        assert dst.tolist() == [[3, 3, 1][:r]]


def test_takes_no_more_pairs_than_exist(device):
    x = SMALL.x(device)
    unmerged, src, _ = ops.match_bipartite(x, 1000)
    assert src.shape == (3, 14) and unmerged.shape == (3, 1)
    unmerged, src, _ = ops.match_bipartite(x, 1000, class_token=True)
    assert src.shape == (3, 14) and (unmerged == 0).all(), "29 tokens have 14 pairs besides token 0"


@pytest.mark.parametrize("class_token", [False, True])
def test_valid_means_the_row_without_the_rest(class_token, device):
    x, valid = SMALL.x(device), TokenCase(B=3, N=29, ragged=True).valid(device)
    got = ops.match_bipartite(x, 6, valid=valid, class_token=class_token)
    for b in range(len(x)):
        alone = ops.match_bipartite(x[b : b + 1, valid[b]], 6, class_token=class_token)
        for row, expected in zip(got, alone, strict=True):
            tokens.assert_mapped_back(row[b], expected[0], valid[b])


def test_a_row_takes_its_own_budget(device):
    x, budget = SMALL.x(device), torch.tensor([-2, 3, 99], dtype=torch.int32, device=device)
    got = ops.match_bipartite(x, budget, max_r=5)
    for b, r in enumerate([0, 3, 5]):
        alone = ops.match_bipartite(x[b : b + 1], r)
        for row, expected in zip(got, alone, strict=True):
            tokens.assert_mapped_back(row[b], expected[0])


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, device):
    case = TokenCase(B=3, N=29, C=24, ragged=True, budgets=True)
    given = {"metric": case.x(device), "r": case.budget(device), "valid": case.valid(device)}
    viewed = testing.view_all(view, given)
    testing.assert_same_bits(ops.match_bipartite(**viewed), ops.match_bipartite(**given))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    x = TokenCase(N=400, C=256).x(device)
    testing.assert_same_bits_every_run(lambda: ops.match_bipartite(x, 100))


@pytest.mark.parametrize("ragged", [False, True])
def test_is_a_well_formed_operator(ragged, device):
    case = TokenCase(B=2, N=20, C=8, ragged=ragged, budgets=ragged)
    budget = case.budget(device) if ragged else None
    torch.library.opcheck(
        torch.ops.restore_ext.match_bipartite.default,
        (case.x(device), 5, budget, case.valid(device), True),
    )


def test_compiles(device):
    testing.assert_compiles(
        lambda x, r: ops.match_bipartite(x, r, class_token=True),
        *[(TokenCase(B=2, N=n, C=8).x(device), r) for n, r in ((20, 5), (33, 7))],
    )
    testing.assert_compiles(
        lambda x, r, valid: ops.match_bipartite(x, r, valid=valid),
        *[
            (case.x(device), case.budget(device), case.valid(device))
            for case in (
                TokenCase(B=b, N=n, C=8, ragged=True, budgets=True) for b, n in ((2, 20), (3, 33))
            )
        ],
    )


SPOILED = {
    "metric must have 3 dimensions, got shape [20, 8]": lambda x, r: {"metric": x[0], "r": r},
    "metric must be Float, Half or BFloat16, got Double": lambda x, r: {
        "metric": x.double(),
        "r": r,
    },
    "r must not be negative, got -1": lambda x, r: {"metric": x, "r": -1},
    "budget must have shape [B] = [2], got [1]": lambda x, r: {
        "metric": x,
        "r": torch.ones(1, dtype=torch.int32, device=x.device),
    },
    "budget must be Int, got Long": lambda x, r: {
        "metric": x,
        "r": torch.ones(2, dtype=torch.int64, device=x.device),
    },
    "valid must have shape [B, N] = [2, 20], got [2, 8]": lambda x, r: {
        "metric": x,
        "r": r,
        "valid": x[:, 0] > 0,
    },
    "valid must be Bool, got Float": lambda x, r: {"metric": x, "r": r, "valid": x[..., 0]},
}


@pytest.mark.parametrize("message", SPOILED)
def test_says_what_is_wrong(message, device):
    spoiled = SPOILED[message](TokenCase(B=2, N=20, C=8).x(device), 5)
    with pytest.raises(RuntimeError, match=f"^{re.escape('match_bipartite: ' + message)}$"):
        ops.match_bipartite(**spoiled)


def test_takes_no_part_in_a_gradient(device):
    x = SMALL.x(device).requires_grad_()
    assert not any(t.requires_grad for t in ops.match_bipartite(x, 3))
