"""calibrated_attention: SDPA whose logits know how much a key stands for and how far it is."""

import math
import random
import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from restore_ext import ops, reference, testing
from restore_ext.testing.attention import (
    CASES,
    NEVER,
    SMALL,
    SPOILED_BIAS,
    AttentionCase,
    assert_within_twice_sdpa,
    truth,
)

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
FULL = AttentionCase(
    B=2, Hq=4, Hkv=2, Lq=70, Lk=140, D=64, padding=(0, 31), axes=3, P=64, ranges="window"
)


def run(given):
    return ops.calibrated_attention(**given, return_lse=True)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, device):
    given = case.arguments(device, dtype)
    out, lse = run(given)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_within_twice_sdpa((out, lse), given)
    testing.assert_same_bits(ops.calibrated_attention(**given), out)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_small_random_problems_are_as_precise(dtype, device):
    """Short sums show what long ones average out: one long chain of additions fails here."""
    rng = random.Random(0)
    for _ in range(60):
        Hkv, length = rng.choice([1, 2]), rng.randint(1, 40)
        case = AttentionCase(
            B=rng.choice([1, 2]),
            Hq=Hkv * rng.choice([1, 2, 4]),
            Hkv=Hkv,
            Lq=rng.randint(1, length),
            Lk=length,
            D=8 * rng.randint(4, 32),
            causal=rng.random() < 0.7,
            sizes=rng.random() < 0.7,
            positions=rng.choice([None, "far"]),
            P=rng.choice([0, 1, 64]),
        )
        given = case.arguments(device, dtype)
        assert_within_twice_sdpa(run(given), given)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_reference_is_the_formula(softcap, device):
    case = AttentionCase(
        B=2, Hq=4, Hkv=2, Lq=5, Lk=7, D=32, axes=2, P=6, ranges="wild", padding=(2, 0)
    )
    given = case.arguments(device) | {"softcap": softcap}
    out, lse = (t.tolist() for t in truth(given))
    q, k, v, log_size, at_query, at_key, decay, _, key_range, *_ = (
        a.tolist() if isinstance(a, torch.Tensor) else a for a in given.values()
    )
    seen = 0
    for b in range(2):
        for h in range(4):
            for i in range(5):
                weights, mean = 0.0, [0.0] * 32
                for j in range(7):
                    first, past = key_range[b][i]
                    if j > i + 7 - 5 or not first <= j < past or log_size[b][j] == NEVER:
                        continue
                    logit = math.fsum(map(math.prod, zip(q[b][h][i], k[b][h // 2][j], strict=True)))
                    logit /= math.sqrt(32)
                    logit = softcap * math.tanh(logit / softcap) if softcap else logit
                    gaps = (abs(at_query[b][g][i] - at_key[b][g][j]) for g in range(2))
                    rho = sum(decay[g][min(gap, 5)] for g, gap in enumerate(gaps))
                    weight = math.exp(logit + log_size[b][j] + math.log(2 - rho))
                    weights += weight
                    mean = [m + weight * x for m, x in zip(mean, v[b][h // 2][j], strict=True)]
                if weights:
                    seen += 1
                    assert lse[b][h][i] == pytest.approx(math.log(weights), abs=1e-12)
                    assert out[b][h][i] == pytest.approx([m / weights for m in mean], abs=1e-12)
                else:
                    assert lse[b][h][i] == NEVER and out[b][h][i] == [0.0] * 32
    assert 0 < seen < 40, "some queries see something, some nothing"


@pytest.mark.parametrize("Hkv", [8, 2])
def test_without_a_bias_it_is_sdpa(Hkv, device):
    case = AttentionCase(B=2, Hq=8, Hkv=Hkv, Lq=100, Lk=100, D=64, sizes=False)
    q, k, v = (case.arguments(device)[name] for name in ("query", "key", "value"))
    for causal in (True, False):
        expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(ops.calibrated_attention(q, k, v, causal=causal), expected)


def test_a_key_of_size_s_is_s_keys(device):
    case = AttentionCase(Hq=2, Hkv=1, Lq=9, Lk=20, D=32, positions=None, P=0, causal=False)
    given = case.arguments(device)
    copies = given["log_size"][0].exp().round().long()
    many = given | {k: given[k].repeat_interleave(copies, 2) for k in ("key", "value")}
    torch.testing.assert_close(run(given), run(many | {"log_size": None}))


def test_padding_is_the_sequence_without_it(device):
    case = AttentionCase(Hq=2, Hkv=2, Lq=40, Lk=150, D=64, holes=True, causal=False)
    given = case.arguments(device)
    kept = given["log_size"][0] > NEVER
    without = given | {k: given[k][:, :, kept] for k in ("key", "value")}
    without |= {k: given[k][:, kept] for k in ("log_size", "key_position")}
    assert_within_twice_sdpa(run(given), without)


def test_positions_are_the_indices_by_default(device):
    given = AttentionCase(B=2, Lq=9, Lk=70, D=32, positions=None).arguments(device)
    keys = torch.arange(70, dtype=torch.int32, device=device).expand(2, -1)
    explicit = given | {"query_position": keys[:, 61:], "key_position": keys}
    testing.assert_same_bits(run(given), run(explicit))


def test_one_position_serves_all_axes(device):
    given = FULL.arguments(device)
    for name in ("query_position", "key_position"):
        given[name] = given[name][:, :1].expand(-1, 3, -1)
    short = given | {n: given[n][:, 0] for n in ("query_position", "key_position")}
    testing.assert_same_bits(run(given), run(short))


def test_a_table_of_one_axis_may_be_flat(device):
    given = SMALL.arguments(device)
    testing.assert_same_bits(run(given), run(given | {"decay": given["decay"][0]}))


def test_positions_mean_nothing_without_a_table(device):
    given = FULL.arguments(device) | {"decay": None}
    without = given | {"query_position": None, "key_position": None}
    testing.assert_same_bits(run(given), run(without))


def test_a_distance_may_pass_2_to_the_31(device):
    given = SMALL.arguments(device) | {"causal": False}
    ends = torch.tensor([-(2**31), 2**31 - 1, -1, 3, 2**31 - 4], dtype=torch.int32, device=device)
    for name, L in (("query_position", 9), ("key_position", 13)):
        given[name] = ends.repeat(3)[:L].expand(2, -1)
    wide = given | {n: given[n].long() for n in ("query_position", "key_position")}
    expected = reference.calibrated_attention(**wide, return_lse=True)
    torch.testing.assert_close(run(given), expected)


def test_nan_is_seen_where_it_is_seen(device):
    given = AttentionCase(Lq=100, Lk=100, D=32).arguments(device)
    clean = run(given)
    given["key"][0, 1, 70, 5] = math.nan
    given["query"][0, 2, 30, 0] = math.nan
    for out, lse in (run(given), reference.calibrated_attention(**given, return_lse=True)):
        broken = torch.zeros_like(lse, dtype=torch.bool)
        broken[0, 1, 70:] = True
        broken[0, 2, 30] = True
        assert torch.equal(lse.isnan(), broken)
        assert torch.equal(out.isnan(), broken[..., None].expand_as(out))
        torch.testing.assert_close(out[~broken], clean[0][~broken])


def test_nan_stays_in_its_row_of_the_batch(device):
    given = AttentionCase(B=2, Lq=9, Lk=70, D=32, holes=True).arguments(device)
    clean = run(given)
    given["value"][0] = math.nan
    for broken, before in zip(run(given), clean, strict=True):
        testing.assert_same_bits(broken[1], before[1])


def test_a_query_that_sees_nothing_is_zero_even_if_it_is_nan(device):
    case = AttentionCase(B=2, Lq=70, Lk=70, D=32, padding=(66, 0))
    given = case.arguments(device)
    given["query"][0, :, :66] = math.nan  # what a layer may leave in padding
    for out, lse in (run(given), reference.calibrated_attention(**given, return_lse=True)):
        assert (out[0, :, :66] == 0).all() and (lse[0, :, :66] == NEVER).all()
        assert out.isfinite().all() and lse[0, :, 66:].isfinite().all()


@pytest.mark.parametrize("view", testing.VIEWS)
def test_reads_nothing_outside_a_view(view, device):
    given = FULL.arguments(device)
    testing.assert_same_bits(run(testing.view_all(view, given)), run(given))


def test_takes_heads_as_transformers_lays_them_out(device):
    given = FULL.arguments(device)
    across = {k: given[k].transpose(1, 2).contiguous() for k in ("query", "key", "value")}
    testing.assert_same_bits(
        run(given | {k: t.transpose(1, 2) for k, t in across.items()}), run(given)
    )


def test_reads_no_key_before_or_past_what_is_seen(device):
    case = AttentionCase(B=2, Lq=9, Lk=150, D=32, causal=False)  # a static cache, half filled
    given = case.arguments(device)
    short = given | {k: given[k][:, :, 20:81] for k in ("key", "value")}
    short |= {k: given[k][:, 20:81] for k in ("log_size", "key_position")}
    for name in ("key", "value"):
        given[name][:, :, :20] = math.nan
        given[name][:, :, 81:] = math.nan
    given["key_range"] = torch.tensor([20, 81], dtype=torch.int32, device=device).expand(2, 9, 2)
    testing.assert_same_bits(run(given), run(short))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    given = FULL.arguments(device, torch.bfloat16)
    testing.assert_same_bits_every_run(lambda: run(given))


@pytest.mark.parametrize("plain", [False, True])
def test_is_a_well_formed_operator(plain, device):
    given = AttentionCase(B=2, Lq=9, Lk=13, D=32, axes=3, P=8, ranges="window").arguments(device)
    if plain:
        given = {k: a if k in ("query", "key", "value") else None for k, a in given.items()}
        given |= {"causal": True, "softcap": 0.0}
    across = {k: given[k].transpose(1, 2).contiguous() for k in ("query", "key", "value")}
    given |= {k: t.transpose(1, 2) for k, t in across.items()}
    torch.library.opcheck(torch.ops.restore_ext.calibrated_attention.default, tuple(given.values()))


def test_compiles(device):
    def layer(query, key, value, log_size, query_position, key_position, decay):
        return ops.calibrated_attention(
            query * 2,
            key,
            value,
            log_size=log_size,
            query_position=query_position,
            key_position=key_position,
            decay=decay,
            return_lse=True,
        )

    cases = (  # no two sizes alike: torch.compile would take them for one
        AttentionCase(B=3, Hq=4, Hkv=2, Lq=9, Lk=13, D=32, P=8),
        AttentionCase(B=5, Hq=6, Hkv=3, Lq=7, Lk=17, D=40, P=10),
    )
    testing.assert_compiles(layer, *[tuple(case.arguments(device).values())[:7] for case in cases])


SPOILED = SPOILED_BIAS | {
    "query must have 4 dimensions, got shape [4, 9, 32]": lambda g: {"query": g["query"][0]},
    "key must have 4 dimensions, got shape [2, 13, 32]": lambda g: {"key": g["key"][0]},
    "query must have a head size D of 32 to 256 in steps of 8, got 31": lambda g: {
        "query": g["query"][..., 1:]
    },
    "query must have a head size D of 32 to 256 in steps of 8, got 288": lambda g: {
        "query": g["query"].repeat(1, 1, 1, 9)
    },
    "key must have shape [B, Hkv, Lk, D] = [2, 2, 13, 32], got [1, 2, 13, 32]": lambda g: {
        "key": g["key"][:1]
    },
    "value must have shape [B, Hkv, Lk, D] = [2, 2, 13, 32], got [2, 2, 12, 32]": lambda g: {
        "value": g["value"][:, :, 1:]
    },
    "key must have a number of heads Hkv that divides query's Hq = 3, got 2": lambda g: {
        "query": g["query"][:, 1:]
    },
    "query must be Float, Half or BFloat16, got Double": lambda g: {"query": g["query"].double()},
    "key must have the dtype of query, Float, got Half": lambda g: {"key": g["key"].half()},
    "value must have the dtype of query, Float, got BFloat16": lambda g: {
        "value": g["value"].bfloat16()
    },
    "log_size must have shape [B, Lk] = [2, 13], got [2, 12]": lambda g: {
        "log_size": g["log_size"][:, 1:]
    },
    "log_size must be Float, got Half": lambda g: {"log_size": g["log_size"].half()},
    "query_position and key_position must both be given or neither, got only key_position": (
        lambda g: {"query_position": None}
    ),
    "query_position must have shape [B, Lq] = [2, 9], got [2, 8]": lambda g: {
        "query_position": g["query_position"][:, 1:]
    },
    "query_position must have shape [B, G, Lq] = [2, 1, 9], got [2, 3, 9]": lambda g: {
        "query_position": g["query_position"][:, None].expand(-1, 3, -1)
    },
    "key_position must have shape [B, Lk] = [2, 13], got [1, 13]": lambda g: {
        "key_position": g["key_position"][:1]
    },
    "key_position must have shape [B, G, Lk] = [2, 1, 13], got [13]": lambda g: {
        "key_position": g["key_position"][0]
    },
    "key_range must have shape [B, Lq, 2] = [2, 9, 2], got [2, 9, 3]": lambda g: {
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
    with pytest.raises(RuntimeError, match=f"^{re.escape('calibrated_attention: ' + message)}$"):
        ops.calibrated_attention(**given)


def test_refuses_a_gradient(device):
    given = SMALL.arguments(device)
    given["value"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"calibrated_attention has no gradient.*backend=.mask"):
        ops.calibrated_attention(**given).sum().backward()
