"""merge_tokens: the size-weighted mean of the tokens of a group, rounded once."""

import re

import pytest
import torch

from restore_ext import ops, reference, testing
from restore_ext.testing.tokens import MERGE_CASES, MergeCase, check_merge_tokens

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
SMALL = MergeCase(B=2, N=20, M=5, C=8)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", MERGE_CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, device):
    given = case.arguments(device, dtype)
    check_merge_tokens(ops.merge_tokens(**given), **given)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_token_alone_is_untouched(dtype, device):
    x = SMALL.arguments(device, dtype)["x"]
    order = torch.randperm(20, device=device)
    merged, size, position = ops.merge_tokens(x, order.expand(2, 20), 20)
    assert torch.equal(merged[:, order], x) and (size == 1).all()
    assert torch.equal(position, order.argsort().expand(2, 20))


def test_a_token_alone_is_untouched_whatever_it_weighs(device):
    given = SMALL.arguments(device, torch.float32)
    given |= {"group": torch.arange(20, device=device).expand(2, 20), "num_groups": 20}
    merged, size, _ = ops.merge_tokens(**given)
    assert torch.equal(merged, given["x"]) and torch.equal(size, given["size"])


# Around the chunks in which the CUDA kernels sum a group (64 members), in which they load them (8),
# and the 32 tokens that a warp places at once. One group takes 70 % of the tokens.
LENGTHS = [64, 2100, 0, 65, 1, 128, 129, 8, 63, 0, 0, 192, 31, 33, 7, 9]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("C", [40, 3], ids="C={}".format)
def test_groups_of_any_length(C, shuffled, device):
    g = torch.Generator().manual_seed(0)
    group = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    N = len(group)
    group = torch.cat([group.new_full((1, 50), -1), group[None]], 1).repeat(2, 1)
    if shuffled:
        group = torch.stack([row[torch.randperm(N + 50, generator=g)] for row in group])
    given = {
        "x": torch.randn(2, N + 50, C, generator=g).to(device),
        "group": group.to(device),
        "num_groups": len(LENGTHS),
        "size": torch.randint(1, 9, (2, N + 50), generator=g).float().to(device),
        "position": torch.randint(-(2**40), 2**40, (2, N + 50), generator=g).to(device),
    }
    check_merge_tokens(ops.merge_tokens(**given), **given)
    given |= {"size": None, "position": None}
    check_merge_tokens(ops.merge_tokens(**given), **given)


def test_more_groups_than_a_block_can_count(device):
    given = MergeCase(N=70, M=66_000, C=1).arguments(device, torch.float32)
    given["group"][:, -5:] = 65_999
    check_merge_tokens(ops.merge_tokens(**given), **given)


MANY = 300
POSITIONS = {
    "ascending": torch.arange(MANY) - 17,
    "descending": -torch.arange(MANY),
    "a step back": torch.arange(MANY) - 2 * (torch.arange(MANY) == MANY - 1),
    "equal": torch.full((MANY,), -5),
    "few": torch.arange(MANY) % 3 - 1,
    "one bit": torch.arange(MANY) % 2 << 32,
    "all bits": torch.arange(MANY) * 0x9E3779B97F4A7C15,
    "far apart": torch.where(torch.arange(MANY) % 5 < 2, 2**63 - 1, -(2**63)),
}


@pytest.mark.parametrize("order", POSITIONS)
def test_position_is_exact_for_any_numbers(order, device):
    position = POSITIONS[order][None].to(device)
    x = torch.zeros(1, MANY, 1, device=device)
    for M in (1, 2, 7):
        group = (torch.arange(MANY, device=device) * 5 % 11 % M)[None]
        got = ops.merge_tokens(x, group, M, position=position)[2]
        wanted = reference.merge_tokens(x.double(), group, M, position=position)[2]
        assert torch.equal(got, wanted)


def test_position_is_the_lower_median(device):
    x = torch.zeros(1, 7, 1, device=device)
    group = torch.tensor([[0, 1, 0, 0, 2, 0, 1]], device=device)
    position = torch.tensor([[90, 5, -70, 2**40, 3, 20, 5]], device=device)
    assert ops.merge_tokens(x, group, 4)[2].tolist() == [[2, 1, 4, -1]]
    assert ops.merge_tokens(x, group, 4, position=position)[2].tolist() == [[20, 5, 3, -1]]


def test_an_id_outside_leaves_its_token_out(device):
    x = torch.tensor([[[1.0], [2.0], [float("nan")], [4.0], [float("inf")]]], device=device)
    group = torch.tensor([[1, 1, -1, 1, 2]], device=device)
    for far in (-1, 2, 2**40, -(2**40)):
        group[0, 4] = far
        merged, size, position = ops.merge_tokens(x, group, 2)
        torch.testing.assert_close(merged.cpu(), torch.tensor([[[0.0], [7 / 3]]]))
        assert size.tolist() == [[0, 3]] and position.tolist() == [[-1, 1]]


def test_nan_stays_in_its_own_group(device):
    given = SMALL.arguments(device, torch.float32)
    given["group"][0, :5] = torch.arange(5)
    given["x"][0, 3, 2] = float("nan")
    for op in (ops.merge_tokens, reference.merge_tokens):
        broken = op(**given)[0].isnan()
        assert broken[0, 3, 2] and broken.sum() == 1


def test_a_group_that_weighs_nothing_is_zeros(device):
    given = SMALL.arguments(device, torch.float32)
    given["size"] = (given["group"] != 2).float()
    given["group"][:, 0] = 2
    given["size"][:, 0] = 0
    for op in (ops.merge_tokens, reference.merge_tokens):
        merged, size, position = op(**given)
        assert (merged[:, 2] == 0).all() and (size[:, 2] == 0).all(), "no mean without weight"
        assert (position[:, 2] >= 0).all(), "but it has members"


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, device):
    given = SMALL.arguments(device, torch.float32)
    viewed = testing.view_all(view, given)
    testing.assert_same_bits(ops.merge_tokens(**viewed), ops.merge_tokens(**given))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    given = MergeCase(B=2).arguments(device, torch.bfloat16)
    testing.assert_same_bits_every_run(lambda: ops.merge_tokens(**given))


@pytest.mark.parametrize("plain", [False, True])
def test_is_a_well_formed_operator(plain, device):
    given = SMALL.arguments(device, torch.float32)
    if plain:
        given |= {"size": None, "position": None}
    torch.library.opcheck(torch.ops.restore_ext.merge_tokens.default, tuple(given.values()))


def test_compiles(device):
    cases = (SMALL, MergeCase(B=3, N=33, M=7, C=12))
    testing.assert_compiles(
        lambda x, group, M, size, position: ops.merge_tokens(
            x, group, M, size=size, position=position
        ),
        *[tuple(case.arguments(device, torch.float32).values()) for case in cases],
    )


SPOILED = {
    "x must have 3 dimensions, got shape [20, 8]": lambda g: {"x": g["x"][0]},
    "x must be Float, Half or BFloat16, got Double": lambda g: {"x": g["x"].double()},
    "group must have shape [B, N] = [2, 20], got [2, 19]": lambda g: {"group": g["group"][:, 1:]},
    "group must be Long, got Int": lambda g: {"group": g["group"].int()},
    "num_groups must be at least 1, got 0": lambda g: {"num_groups": 0},
    "size must have shape [B, N] = [2, 20], got [2, 19]": lambda g: {"size": g["size"][:, 1:]},
    "size must be Float, got Half": lambda g: {"size": g["size"].half()},
    "position must have shape [B, N] = [2, 20], got [20]": lambda g: {"position": g["position"][0]},
    "position must be Long, got Int": lambda g: {"position": g["position"].int()},
}


@pytest.mark.parametrize("message", SPOILED)
def test_says_what_is_wrong(message, device):
    given = SMALL.arguments(device, torch.float32)
    given |= SPOILED[message](given)
    with pytest.raises(RuntimeError, match=f"^{re.escape('merge_tokens: ' + message)}$"):
        ops.merge_tokens(**given)


def test_refuses_a_gradient(device):
    given = SMALL.arguments(device, torch.float32)
    given["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="merge_tokens has no gradient: it is for inference"):
        ops.merge_tokens(**given)[0].sum().backward()
