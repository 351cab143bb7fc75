"""row_scores: what some rows of queries attend to, without their attention matrix."""

import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from restore_ext import ops, reference, testing
from restore_ext.testing.attention import NEVER, SPOILED_BIAS
from restore_ext.testing.row_scores import (
    CASES,
    SMALL,
    RowScoresCase,
    assert_within_twice_torch,
    truth,
)

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
FULL = replace(SMALL, Lq=70, Lk=140, D=64, padding=(0, 31), axes=3, P=64, ranges="window")


def run(given):
    return ops.row_scores(**given)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, device):
    given = case.arguments(device, dtype)
    assert_within_twice_torch(run(given), given)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_small_random_problems_are_as_precise(dtype, device):
    rng = random.Random(0)
    for _ in range(40):
        Hkv = rng.choice([1, 2])
        case = RowScoresCase(
            B=rng.choice([1, 2]),
            Hq=Hkv * rng.choice([1, 2, 4]),
            Hkv=Hkv,
            Lq=rng.randint(1, 40),
            Lk=rng.randint(1, 80),
            D=8 * rng.randint(4, 32),
            sizes=rng.random() < 0.7,
            positions=rng.choice([None, "far"]),
            P=rng.choice([0, 1, 64]),
            ranges=rng.choice([None, "causal", "wild"]),
            weights=rng.choice([None, "some"]),
        )
        given = case.arguments(device, dtype)
        assert_within_twice_torch(run(given), given)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_reference_is_the_formula(softcap, device):
    case = replace(FULL, Lq=5, Lk=7, D=32, axes=2, P=6, ranges="wild", padding=(2, 0))
    given = case.arguments(device) | {"softcap": softcap}
    score = truth(given).tolist()
    q, k, weight, log_size, at_query, at_key, decay, key_range, *_ = (
        a.tolist() if isinstance(a, torch.Tensor) else a for a in given.values()
    )
    seen = 0
    for b in range(2):
        expected = [0.0] * 7
        for h in range(4):
            for r in range(5):
                if weight[b][r] == 0:
                    continue
                mass = {}
                for j in range(*key_range[b][r]):
                    if not 0 <= j < 7 or log_size[b][j] == NEVER:
                        continue
                    logit = math.fsum(map(math.prod, zip(q[b][h][r], k[b][h // 2][j], strict=True)))
                    logit /= math.sqrt(32)
                    logit = softcap * math.tanh(logit / softcap) if softcap else logit
                    gaps = (abs(at_query[b][g][r] - at_key[b][g][j]) for g in range(2))
                    rho = sum(decay[g][min(gap, 5)] for g, gap in enumerate(gaps))
                    mass[j] = math.exp(logit + log_size[b][j] + math.log(2 - rho))
                for j, own in mass.items():
                    seen += 1
                    expected[j] += weight[b][r] / 4 * own / math.fsum(mass.values())
        assert score[b] == pytest.approx(expected, abs=1e-12)
    assert 0 < seen < 2 * 4 * 5 * 7, "some keys are seen, some are not"


def test_one_row_of_one_head_is_its_softmax(device):
    given = RowScoresCase(Hq=1, Hkv=1, Lq=1, Lk=90, D=64, sizes=False, P=0).arguments(device)
    expected = (given["query"][0, 0] @ given["key"][0, 0].T / 8).softmax(-1)
    torch.testing.assert_close(run(given), expected)


def test_many_rows_are_the_column_sums_of_attention(device):
    """In place of values, one-hot vectors: then the output of attention is the attention."""
    given = RowScoresCase(B=2, Hq=4, Hkv=2, Lq=64, Lk=64, D=64, ranges="causal").arguments(device)
    given["log_size"][:, :9] = NEVER
    value = torch.eye(64, device=device).expand(2, 2, -1, -1)
    others = {name: a for name, a in given.items() if name != "weight"}
    attention = reference.calibrated_attention(value=value, causal=True, **others)
    torch.testing.assert_close(run(given), attention.mean(1).mean(1))


def test_a_row_gives_its_weight_away(device):
    case = RowScoresCase(B=3, Hq=4, Hkv=2, Lq=50, Lk=150, D=64, padding=(0, 3, 97), weights="some")
    given = case.arguments(device)
    torch.testing.assert_close(run(given).sum(1), given["weight"].sum(1), atol=1e-5, rtol=1e-5)
    without = given | {"weight": None, "query": given["query"].nan_to_num(0.5)}
    torch.testing.assert_close(run(without).sum(1), torch.ones(3, device=device))


def test_without_weights_all_count_the_same(device):
    given = SMALL.arguments(device) | {"weight": None}
    given["query"] = given["query"].nan_to_num(0.5)
    weight = torch.full((2, 9), 1 / 9, device=device)
    testing.assert_same_bits(run(given), run(given | {"weight": weight}))


@pytest.mark.parametrize("Lq", [2, 40])
def test_a_row_of_weight_0_is_left_out(Lq, device):
    case = RowScoresCase(B=2, Hq=4, Hkv=2, Lq=2 * Lq, Lk=70, D=32, ranges="window")
    given = case.arguments(device)
    given["weight"] = torch.rand(2, 2 * Lq, device=device)
    given["weight"][:, 1::2] = 0
    given["query"][:, :, 1::2] = math.nan
    few = given | {n: given[n][..., ::2] for n in ("weight", "query_position")}
    few |= {"query": given["query"][:, :, ::2], "key_range": given["key_range"][:, ::2]}
    assert_within_twice_torch(run(given), few)


def test_a_key_of_size_s_is_s_keys(device):
    case = RowScoresCase(Hq=2, Hkv=1, Lq=9, Lk=20, D=32, positions=None, P=0)
    given = case.arguments(device)
    copies = given["log_size"][0].exp().round().long()
    many = run(given | {"key": given["key"].repeat_interleave(copies, 2), "log_size": None})
    owner = torch.arange(20, device=device).repeat_interleave(copies)
    expected = torch.zeros(20, device=device).index_add(0, owner, many[0])
    torch.testing.assert_close(run(given)[0], expected)


def test_padding_is_the_sequence_without_it(device):
    case = RowScoresCase(Hq=2, Hkv=2, Lq=40, Lk=150, D=64, holes=True)
    given = case.arguments(device)
    kept = given["log_size"][0] > NEVER
    without = given | {"key": given["key"][:, :, kept]}
    without |= {k: given[k][:, kept] for k in ("log_size", "key_position")}
    score = run(given)
    assert (score[:, ~kept] == 0).all()
    assert_within_twice_torch(score[:, kept], without)


def test_positions_are_the_indices_by_default(device):
    given = RowScoresCase(B=2, Lq=9, Lk=70, D=32, positions=None).arguments(device)
    keys = torch.arange(70, dtype=torch.int32, device=device).expand(2, -1)
    explicit = given | {"query_position": keys[:, 61:], "key_position": keys}
    testing.assert_same_bits(run(given), run(explicit))


def test_one_position_serves_all_axes(device):
    given = FULL.arguments(device)
    given["key_position"] = given["key_position"][:, :1].expand(-1, 3, -1)
    short = given | {"key_position": given["key_position"][:, 0]}
    testing.assert_same_bits(run(given), run(short))


def test_a_table_of_one_axis_may_be_flat(device):
    given = SMALL.arguments(device)
    testing.assert_same_bits(run(given), run(given | {"decay": given["decay"][0]}))


def test_positions_mean_nothing_without_a_table(device):
    given = FULL.arguments(device) | {"decay": None}
    without = given | {"query_position": None, "key_position": None}
    testing.assert_same_bits(run(given), run(without))


def test_a_distance_may_pass_2_to_the_31(device):
    given = SMALL.arguments(device)
    ends = torch.tensor([-(2**31), 2**31 - 1, -1, 3, 2**31 - 4], dtype=torch.int32, device=device)
    for name, L in (("query_position", 9), ("key_position", 13)):
        given[name] = ends.repeat(3)[:L].expand(2, -1)
    wide = given | {n: given[n].long() for n in ("query_position", "key_position")}
    assert_within_twice_torch(run(given), wide)


@pytest.mark.parametrize("Lq", [5, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_nan_gives_nan_to_what_it_sees(Lq, bad, device):
    case = RowScoresCase(B=2, Lq=Lq, Lk=150, D=32, ranges="window", padding=(0, 140))
    given = case.arguments(device)
    clean = run(given)
    seen = given["key_range"][0, 3]
    given["query"][0, 2, 3, :] = bad
    broken = torch.zeros(2, 150, dtype=torch.bool, device=device)
    broken[0, max(int(seen[0]), 0) : int(seen[1])] = True
    for score in (run(given), reference.row_scores(**given)):
        assert torch.equal(score.isnan(), broken)
        torch.testing.assert_close(score[~broken], clean[~broken])


def test_a_key_of_nan_spoils_the_rows_that_see_it(device):
    given = RowScoresCase(Lq=100, Lk=150, D=32, ranges="window").arguments(device)
    given["key"][0, 1, 70, 5] = math.nan
    first, past = given["key_range"][0].unbind(-1)
    broken = torch.zeros(1, 150, dtype=torch.bool, device=device)
    for r in torch.nonzero((first <= 70) & (past > 70)).flatten().tolist():
        broken[0, max(int(first[r]), 0) : int(past[r])] = True
    assert 20 < broken.sum() < 100
    for score in (run(given), reference.row_scores(**given)):
        assert torch.equal(score.isnan(), broken)


@pytest.mark.parametrize("rho", [2.0, 3.0, math.nan])
def test_a_decay_may_hide_a_key_or_spoil_a_row(rho, device):
    given = SMALL.arguments(device)
    given["decay"][..., 3:] = rho
    expected = reference.row_scores(**given)
    assert expected.isnan().any() == (rho != 2) and (rho != 2 or (expected == 0).any())
    torch.testing.assert_close(run(given), expected, equal_nan=True)


def test_a_row_that_sees_nothing_adds_nothing_even_if_it_is_nan(device):
    case = RowScoresCase(B=2, Lq=70, Lk=70, D=32, padding=(66, 0), ranges="causal")
    given = case.arguments(device)
    given["query"][0, :, :66] = math.nan  # what a layer may leave in padding
    score = run(given)
    assert score.isfinite().all() and (score[0, :66] == 0).all()
    torch.testing.assert_close(score.sum(1), torch.tensor([4 / 70, 1], device=device))


@pytest.mark.parametrize("view", testing.VIEWS)
@pytest.mark.parametrize("Lq", [3, 70])
def test_reads_nothing_outside_a_view(view, Lq, device):
    case = RowScoresCase(
        B=2, Hq=4, Hkv=2, Lq=Lq, Lk=140, D=64, padding=(0, 31), axes=3, P=64, ranges="window"
    )
    given = case.arguments(device) | {"weight": torch.rand(2, Lq, device=device)}
    testing.assert_same_bits(run(testing.view_all(view, given)), run(given))


def test_takes_heads_as_transformers_lays_them_out(device):
    given = FULL.arguments(device)
    across = {k: given[k].transpose(1, 2).contiguous() for k in ("query", "key")}
    testing.assert_same_bits(
        run(given | {k: t.transpose(1, 2) for k, t in across.items()}), run(given)
    )


@pytest.mark.parametrize(
    "case",
    [
        FULL,
        RowScoresCase(B=2, Hq=8, Hkv=2, Lq=1, Lk=1100, D=64),
        RowScoresCase(Hq=6, Hkv=2, Lq=250, Lk=250, D=32, ranges="causal"),
    ],
    ids=str,
)
def test_same_bits_every_run_and_on_any_number_of_threads(case, device):
    given = case.arguments(device, torch.bfloat16)
    testing.assert_same_bits_every_run(lambda: run(given))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_stores_no_attention_matrix(device):
    """On the CPU by the peak of the process; test_gpu_memory.py asks a GPU's allocator."""
    if device != "cpu" or ops._ops is not torch.ops.restore_ext:
        pytest.skip("of the CPU's body")
    case = RowScoresCase(Hq=8, Hkv=8, Lq=2000, Lk=2000, D=32, ranges="causal")
    given = case.arguments(device)

    def memory(line):  # in bytes
        return (
            int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
        )

    run(SMALL.arguments(device))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = memory("VmRSS")
    run(given)
    matrix = 4 * 8 * 2000 * 2000
    assert memory("VmHWM") - before < matrix / 8


@pytest.mark.parametrize("plain", [False, True])
def test_is_a_well_formed_operator(plain, device):
    case = RowScoresCase(
        B=2, Lq=9, Lk=13, D=32, axes=3, P=8, ranges="window", weights=None if plain else "some"
    )
    given = case.arguments(device)
    if plain:
        given = {k: a if k in ("query", "key") else None for k, a in given.items()}
        given |= {"softcap": 0.0}
    across = {k: given[k].transpose(1, 2).contiguous() for k in ("query", "key")}
    given |= {k: t.transpose(1, 2) for k, t in across.items()}
    torch.library.opcheck(torch.ops.restore_ext.row_scores.default, tuple(given.values()))


def test_compiles(device):
    def layer(query, key, weight, log_size, query_position, key_position, decay):
        return ops.row_scores(
            query * 2,
            key,
            weight=weight,
            log_size=log_size,
            query_position=query_position,
            key_position=key_position,
            decay=decay,
        )

    cases = (  # no two sizes alike: torch.compile would take them for one
        RowScoresCase(B=3, Hq=4, Hkv=2, Lq=9, Lk=13, D=32, P=8, weights="some"),
        RowScoresCase(B=5, Hq=6, Hkv=3, Lq=7, Lk=17, D=40, P=10, weights="some"),
    )
    testing.assert_compiles(layer, *[tuple(case.arguments(device).values())[:7] for case in cases])


SPOILED = SPOILED_BIAS | {
    "query must have 4 dimensions, got shape [4, 9, 32]": lambda g: {"query": g["query"][0]},
    "key must have 4 dimensions, got shape [2, 13, 32]": lambda g: {"key": g["key"][0]},
    "query must have a head size D of 32 to 256 in steps of 8, got 31": lambda g: {
        "query": g["query"][..., 1:]
    },
    "query must have at least one head to take the mean of, got shape [2, 0, 9, 32]": lambda g: {
        "query": g["query"][:, :0]
    },
    "key must have shape [B, Hkv, K, D] = [2, 2, 13, 32], got [1, 2, 13, 32]": lambda g: {
        "key": g["key"][:1]
    },
    "key must have shape [B, Hkv, K, D] = [2, 2, 13, 32], got [2, 2, 13, 24]": lambda g: {
        "key": g["key"][..., :24]
    },
    "key must have a number of heads Hkv that divides query's Hq = 3, got 2": lambda g: {
        "query": g["query"][:, 1:]
    },
    "query must be Float, Half or BFloat16, got Double": lambda g: {"query": g["query"].double()},
    "key must have the dtype of query, Float, got Half": lambda g: {"key": g["key"].half()},
    "weight must have shape [B, R] = [2, 9], got [9]": lambda g: {"weight": g["weight"][0]},
    "weight must be Float, got Double": lambda g: {"weight": g["weight"].double()},
    "log_size must have shape [B, K] = [2, 13], got [2, 12]": lambda g: {
        "log_size": g["log_size"][:, 1:]
    },
    "log_size must be Float, got Half": lambda g: {"log_size": g["log_size"].half()},
    "query_position and key_position must both be given or neither, got only query_position": (
        lambda g: {"key_position": None}
    ),
    "query_position must have shape [B, R] = [2, 9], got [2, 8]": lambda g: {
        "query_position": g["query_position"][:, 1:]
    },
    "query_position must have shape [B, G, R] = [2, 1, 9], got [2, 3, 9]": lambda g: {
        "query_position": g["query_position"][:, None].expand(-1, 3, -1)
    },
    "key_position must have shape [B, K] = [2, 13], got [1, 13]": lambda g: {
        "key_position": g["key_position"][:1]
    },
    "key_position must have shape [B, G, K] = [2, 1, 13], got [13]": lambda g: {
        "key_position": g["key_position"][0]
    },
    "key_range must have shape [B, R, 2] = [2, 9, 2], got [2, 9, 3]": lambda g: {
        "key_range": torch.zeros(2, 9, 3, dtype=torch.int32, device=g["query"].device)
    },
    "key_range must be Int, got Long": lambda g: {
        "key_range": torch.zeros(2, 9, 2, dtype=torch.int64, device=g["query"].device)
    },
}


@pytest.mark.parametrize("message", SPOILED)
def test_says_what_is_wrong(message, device):
    given = SMALL.arguments(device)
    given |= SPOILED[message](given)
    with pytest.raises(RuntimeError, match=f"^{re.escape('row_scores: ' + message)}$"):
        ops.row_scores(**given)


def test_refuses_a_gradient(device):
    given = SMALL.arguments(device)
    given["key"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"row_scores has no gradient.*reference\.row_scores"):
        ops.row_scores(**given).sum().backward()
