"""assign_anchors: every token joins its most similar anchor."""

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
    x, anchors, valid = case.x(device, dtype), case.anchors(device), case.valid(device)
    for op, given in ((ops.assign_anchors, x), (reference.assign_anchors, x.double())):
        group = op(given, anchors, valid=valid)
        tokens.check_assign_anchors(group, x, anchors, valid=valid)


@pytest.mark.parametrize("case", tokens.TIES, ids=str)
def test_ties_go_to_the_lowest_index(case, device):
    x, anchors, valid = case.x(device), case.anchors(device), case.valid(device)
    got = ops.assign_anchors(x, anchors, valid=valid)
    testing.assert_same_bits(got, reference.assign_anchors(x, anchors, valid=valid))


def test_many_tokens_and_anchors(device):
    case = TokenCase(B=2, N=1500, k=300, C=9, ragged=True)  # more than a block of threads or a tile
    x, anchors, valid = case.x(device), case.anchors(device), case.valid(device)
    group = ops.assign_anchors(x, anchors, valid=valid)
    tokens.check_assign_anchors(group, x, anchors, valid=valid)


def test_an_anchor_belongs_to_itself(device):
    x = torch.ones(1, 6, 4, device=device)  # all alike: others join the first
    anchors = torch.tensor([[4, 1, 3]], device=device)
    assert ops.assign_anchors(x, anchors).tolist() == [[0, 1, 0, 2, 0, 0]]
    x[0, 3, 0] = float(
        "nan"
    )  # also one that cannot be compared; and of two entries the first counts
    anchors = torch.tensor([[4, 3, 3]], device=device)
    assert ops.assign_anchors(x, anchors).tolist() == [[0, 0, 0, 1, 0, 0]]


def test_an_anchor_that_cannot_be_compared_is_the_last_choice(device):
    x = torch.tensor([[1.0], [float("nan")], [1.0], [-1.0], [float("inf")], [-1.0]], device=device)
    anchors = torch.tensor([[1, 3]], device=device)  # even its opposite is more similar to a token
    assert ops.assign_anchors(x[None], anchors).tolist() == [[1, 0, 1, 1, 0, 1]]


def test_what_is_outside_or_not_valid_is_no_anchor(device):
    x = SMALL.x(device)
    valid = torch.ones(3, 29, dtype=torch.bool, device=device)
    valid[:, 7] = False
    anchors = torch.tensor([[-1, 7, 5], [29, -(2**40), 2**40], [2, 7, -1]], device=device)
    group = ops.assign_anchors(x, anchors, valid=valid)
    assert (group[:, 7] == -1).all()
    assert (group[0, valid[0]] == 2).all() and (group[2, valid[2]] == 0).all()
    assert (group[1] == -1).all(), "a row without anchors"


def test_valid_means_the_row_without_the_rest(device):
    x, valid = SMALL.x(device), TokenCase(B=3, N=29, ragged=True).valid(device)
    anchors = SMALL.anchors(device)
    got = ops.assign_anchors(x, anchors, valid=valid)
    for b in range(len(x)):
        new_index = (valid[b].cumsum(0) - 1).masked_fill(~valid[b], -1)
        alone = ops.assign_anchors(x[b : b + 1, valid[b]], new_index[anchors[b : b + 1]])
        testing.assert_same_bits(got[b, valid[b]], alone[0])
        assert (got[b, ~valid[b]] == -1).all()


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, device):
    case = TokenCase(B=3, N=29, k=8, C=24, ragged=True)
    given = {"x": case.x(device), "anchors": case.anchors(device), "valid": case.valid(device)}
    viewed = testing.view_all(view, given)
    testing.assert_same_bits(ops.assign_anchors(**viewed), ops.assign_anchors(**given))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    case = TokenCase(N=400, C=256)
    x, anchors = case.x(device), case.anchors(device)
    testing.assert_same_bits_every_run(lambda: ops.assign_anchors(x, anchors))


@pytest.mark.parametrize("ragged", [False, True])
def test_is_a_well_formed_operator(ragged, device):
    case = TokenCase(B=2, N=20, k=5, C=8, ragged=ragged)
    torch.library.opcheck(
        torch.ops.restore_ext.assign_anchors.default,
        (case.x(device), case.anchors(device), case.valid(device)),
    )


def test_compiles(device):
    cases = [TokenCase(B=b, N=n, k=k, C=8, ragged=True) for b, n, k in ((2, 20, 5), (3, 33, 7))]
    testing.assert_compiles(
        lambda x, anchors, valid: ops.assign_anchors(x, anchors, valid=valid),
        *[(case.x(device), case.anchors(device), case.valid(device)) for case in cases],
    )


SPOILED = {
    "x must have 3 dimensions, got shape [20, 8]": lambda x, a: {"x": x[0], "anchors": a},
    "x must be Float, Half or BFloat16, got Double": lambda x, a: {"x": x.double(), "anchors": a},
    "anchors must have 2 dimensions, got shape [5]": lambda x, a: {"x": x, "anchors": a[0]},
    "anchors must have shape [B, K] = [2, 5], got [1, 5]": lambda x, a: {"x": x, "anchors": a[:1]},
    "anchors must be Long, got Int": lambda x, a: {"x": x, "anchors": a.int()},
    "valid must have shape [B, N] = [2, 20], got [2, 5]": lambda x, a: {
        "x": x,
        "anchors": a,
        "valid": a > 0,
    },
    "valid must be Bool, got Float": lambda x, a: {"x": x, "anchors": a, "valid": x[..., 0]},
}


@pytest.mark.parametrize("message", SPOILED)
def test_says_what_is_wrong(message, device):
    case = TokenCase(B=2, N=20, k=5, C=8)
    spoiled = SPOILED[message](case.x(device), case.anchors(device))
    with pytest.raises(RuntimeError, match=f"^{re.escape('assign_anchors: ' + message)}$"):
        ops.assign_anchors(**spoiled)


def test_takes_no_part_in_a_gradient(device):
    group = ops.assign_anchors(SMALL.x(device).requires_grad_(), SMALL.anchors(device))
    assert not group.requires_grad
