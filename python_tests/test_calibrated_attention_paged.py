"""calibrated_attention_paged: a few queries over a cache whose tokens lie in pages."""

import math
import random

import pytest
import torch

from restore_ext import ops, reference, testing
from restore_ext.testing.attention import NEVER, assert_within_twice_sdpa
from restore_ext.testing.paged import CASES, SMALL, PagedCase, contiguous

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
FULL = PagedCase(
    Hq=8, Hkv=2, Lq=3, D=64, lengths=(140, 71, 2), holes=True, stray=True, positions="merged",
    axes=3, P=64,
)  # fmt: skip
CACHES = ("key_cache", "value_cache")
OF_PAGES = (*CACHES, "log_size")


def run(given):
    return ops.calibrated_attention_paged(**given, return_lse=True)


def truth(given):
    heads = {k: given[k].double() for k in ("query", *CACHES)}
    return reference.calibrated_attention_paged(**given | heads, return_lse=True)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_means_what_the_reference_says(case, dtype, device):
    given = case.arguments(device, dtype)
    out, lse = run(given)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_within_twice_sdpa((out, lse), contiguous(given))
    testing.assert_same_bits(ops.calibrated_attention_paged(**given), out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_that_of_the_tokens_in_a_row(case, device):
    given = case.arguments(device)
    heads = {k: given[k].double() for k in ("query", *CACHES)}
    in_a_row = contiguous(given | heads)
    expected = reference.calibrated_attention(**in_a_row, return_lse=True)
    for got, other in zip(truth(given), expected, strict=True):
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_small_random_problems_are_as_precise(dtype, device):
    rng = random.Random(0)
    for _ in range(40):
        Hkv = rng.choice([1, 2])
        case = PagedCase(
            Hq=Hkv * rng.choice([1, 2, 4, 7]),
            Hkv=Hkv,
            Lq=rng.randint(1, 5),
            D=rng.choice([64, 96, 128, 8 * rng.randint(4, 32)]),
            page=rng.randint(16, 40),
            lengths=tuple(rng.randint(0, 150) for _ in range(rng.choice([1, 2]))),
            max_pages=rng.choice([None, 2, 5]),
            sizes=rng.random() < 0.7,
            positions=rng.choice([None, "far"]),
            P=rng.choice([0, 1, 64]),
        )
        given = case.arguments(device, dtype)
        assert_within_twice_sdpa(run(given), contiguous(given))


def test_the_reference_is_the_formula(device):
    case = PagedCase(
        Hq=4, Hkv=2, Lq=3, D=32, page=16, lengths=(37, 2), holes=True, stray=True,
        positions="merged", axes=2, P=6, softcap=3.0,
    )  # fmt: skip
    given = case.arguments(device)
    out, lse = (t.tolist() for t in truth(given))
    q, k, v, table, seqlens, log_size, at_query, at_key, decay, softcap, _ = (
        a.tolist() if isinstance(a, torch.Tensor) else a for a in given.values()
    )
    seen = 0
    for b in range(2):
        for h in range(4):
            for i in range(3):
                weights, mean = 0.0, [0.0] * 32
                for j in range(seqlens[b] - 3 + i + 1):
                    page, t = table[b][j // 16], j % 16
                    if not 0 <= page < len(k) or log_size[page][t] == NEVER:
                        continue
                    key = k[page][t][h // 2]
                    logit = math.fsum(map(math.prod, zip(q[b][h][i], key, strict=True)))
                    logit = softcap * math.tanh(logit / math.sqrt(32) / softcap)
                    gaps = (abs(at_query[b][g][i] - at_key[g][page][t]) for g in range(2))
                    rho = sum(decay[g][min(gap, 5)] for g, gap in enumerate(gaps))
                    weight = math.exp(logit + log_size[page][t] + math.log(2 - rho))
                    weights += weight
                    mean = [m + weight * x for m, x in zip(mean, v[page][t][h // 2], strict=True)]
                if weights:
                    seen += 1
                    assert lse[b][h][i] == pytest.approx(math.log(weights), abs=1e-12)
                    assert out[b][h][i] == pytest.approx([m / weights for m in mean], abs=1e-12)
                else:
                    assert lse[b][h][i] == NEVER and out[b][h][i] == [0.0] * 32
    assert 0 < seen < 24, "some queries see something, some nothing"


def test_tokens_in_order_are_a_contiguous_cache(device):
    """One page after the other is the cache of calibrated_attention, read by strides."""
    given = PagedCase(Hq=4, Hkv=2, Lq=3, D=64, page=32, lengths=(96,), P=16).arguments(device)
    for name in OF_PAGES:  # by the table, which then lists them in order
        given[name] = given[name][given["block_table"][0].long()]
    given["block_table"] = torch.arange(3, dtype=torch.int32, device=device)[None]
    key, value = (given[n].reshape(1, 96, 2, 64).transpose(1, 2) for n in CACHES)
    names = ("decay", "softcap", "scale")
    expected = ops.calibrated_attention(
        given["query"],
        key,
        value,
        log_size=given["log_size"].reshape(1, 96),
        **{n: given[n] for n in names},
        return_lse=True,
    )
    torch.testing.assert_close(run(given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_page_listed_twice_is_a_page_of_twice_the_size(dtype, device):
    given = PagedCase(Hq=8, Hkv=2, D=64, lengths=(96,)).arguments(device, dtype)
    twice = given | {
        "block_table": given["block_table"].repeat(1, 2),
        "seqlens": given["seqlens"] * 2,
    }
    double = given | {"log_size": given["log_size"] + math.log(2)}
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    for a, b in zip(run(twice), run(double), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_a_token_of_size_s_is_s_tokens(device):
    """Size 3 by the log_size, and by three pages whose tokens are the same."""
    given = PagedCase(Hq=4, Hkv=2, D=32, lengths=(64,), sizes=False).arguments(device)
    pages, page = given["key_cache"].shape[:2]
    size = torch.randint(1, 4, (pages, page), generator=torch.Generator().manual_seed(1)).to(device)
    sized = given | {"log_size": size.float().log()}
    # Copy c of a page holds the tokens whose size is more than c; the others are padding there.
    copies = [torch.where(size > c, 0.0, NEVER) for c in range(3)]
    many = given | {n: given[n].repeat(3, 1, 1, 1) for n in CACHES}
    many |= {
        "log_size": torch.cat(copies),
        "block_table": torch.cat([given["block_table"] + c * pages for c in range(3)], 1).int(),
        "seqlens": given["seqlens"] * 3,
    }
    torch.testing.assert_close(run(sized), run(many))


def test_rows_may_share_pages(device):
    """As after a common prefix: both see the same pages, one of them a part of the last."""
    given = PagedCase(Hq=4, Hkv=2, D=64, lengths=(90,)).arguments(device)
    both = given | {
        "query": given["query"].repeat(2, 1, 1, 1),
        "block_table": given["block_table"].repeat(2, 1),
        "seqlens": torch.tensor([90, 85], dtype=torch.int32, device=device),
    }
    short = given | {"seqlens": both["seqlens"][1:]}
    for pair, long, less in zip(run(both), run(given), run(short), strict=True):
        torch.testing.assert_close(pair[:1], long)
        torch.testing.assert_close(pair[1:], less)


def test_a_chunk_is_its_tokens_one_by_one(device):
    given = PagedCase(Hq=4, Hkv=2, Lq=5, D=64, lengths=(90, 61), P=32).arguments(device)
    out, lse = run(given)
    for i in range(5):
        one = given | {"query": given["query"][:, :, i, None], "seqlens": given["seqlens"] - 4 + i}
        torch.testing.assert_close(run(one), (out[:, :, i, None], lse[:, :, i, None]))


def test_positions_are_the_indices_by_default(device):
    given = PagedCase(Hq=4, Hkv=2, Lq=3, D=64, lengths=(90, 61), P=32).arguments(device)
    at_key = torch.zeros(given["log_size"].shape, dtype=torch.int32, device=device)
    for b, count in enumerate((6, 4)):
        listed = given["block_table"][b, :count].long()
        at_key[listed] = torch.arange(count * 16, dtype=torch.int32, device=device).view(count, 16)
    last = torch.arange(-3, 0, device=device, dtype=torch.int32)
    explicit = {"query_position": given["seqlens"][:, None] + last, "key_position": at_key}
    testing.assert_same_bits(run(given), run(given | explicit))


def test_one_position_serves_all_axes(device):
    given = FULL.arguments(device)
    given["query_position"] = given["query_position"][:, :1].expand(-1, 3, -1)
    given["key_position"] = given["key_position"][:1].expand(3, -1, -1)
    one_query = {"query_position": given["query_position"][:, 0]}
    one_key = {"key_position": given["key_position"][0]}
    for short in (one_query, one_key, one_query | one_key):
        testing.assert_same_bits(run(given), run(given | short))


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
    for name in ("query_position", "key_position"):
        flat = ends.repeat(given[name].numel() // 5 + 1)[: given[name].numel()]
        given[name] = flat.view(given[name].shape)
    wide = given | {n: given[n].long() for n in ("query_position", "key_position")}
    expected = reference.calibrated_attention_paged(**wide, return_lse=True)
    torch.testing.assert_close(run(given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_seen_where_it_is_seen(dtype, device):
    given = PagedCase(Hq=4, Hkv=2, Lq=3, D=64, lengths=(300, 90)).arguments(device, dtype)
    clean = run(given)
    page = given["block_table"][0, -1]
    given["key_cache"][page, 299 - 288 - 1, 1, 5] = math.nan  # index 298: the last two see it
    given["query"][1, 0, 1, 0] = math.nan
    for out, lse in (run(given), truth(given)):
        broken = torch.zeros_like(lse, dtype=torch.bool)
        broken[0, 2:, 1:] = True
        broken[1, 0, 1] = True
        assert torch.equal(lse.isnan(), broken)
        assert torch.equal(out.isnan(), broken[..., None].expand_as(out))
        torch.testing.assert_close(out[~broken].to(dtype), clean[0][~broken], atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_split_is_nan_in_all(dtype, device):
    """An early key among many: other parts of the row must not hide it."""
    given = PagedCase(Hq=4, Hkv=2, D=64, lengths=(700,)).arguments(device, dtype)
    given["key_cache"][given["block_table"][0, 2], 3] = math.nan
    out, lse = run(given)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_sees_nothing_is_zero_even_if_it_is_nan(dtype, device):
    case = PagedCase(Hq=4, Hkv=2, Lq=4, D=64, lengths=(2, 0, 60), holes=True)
    given = case.arguments(device, dtype)
    given["query"][0, :, :2] = math.nan
    given["query"][1] = math.nan
    for out, lse in (run(given), truth(given)):
        assert (out[0, :, :2] == 0).all() and (lse[0, :, :2] == NEVER).all()
        assert (out[1] == 0).all() and (lse[1] == NEVER).all()
        assert out.isfinite().all() and lse[2].isfinite().all()


def test_a_row_is_the_same_in_any_batch(device):
    """Its tokens may lie in other pages, and other rows be longer: results agree to rounding."""
    given = PagedCase(Hq=4, Hkv=2, D=64, lengths=(50, 700, 3)).arguments(device)
    out, lse = run(given)
    for b in range(3):
        alone = {n: given[n][b, None] for n in ("query", "block_table", "seqlens")}
        torch.testing.assert_close(run(given | alone), (out[b, None], lse[b, None]))


@pytest.mark.parametrize("view", testing.VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_nothing_outside_a_view(view, dtype, device):
    given = FULL.arguments(device, dtype)
    viewed = run(testing.view_all(view, given))
    if dtype is torch.float32 or view is testing.poisoned:
        testing.assert_same_bits(viewed, run(given))
    else:  # without dense heads there may be another way
        assert_within_twice_sdpa(viewed, contiguous(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_every_other_element(dtype, device):
    """Its rows begin where packs of 16 bytes would, and are none."""
    given = FULL.arguments(device, dtype)
    for name in ("query", *CACHES):
        wide = given[name].new_full((*given[name].shape, 2), math.nan)
        wide[..., 0] = given[name]
        assert_within_twice_sdpa(run(given | {name: wide[..., 0]}), contiguous(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_takes_pages_with_the_heads_outside(dtype, device):
    given = FULL.arguments(device, dtype)
    outside = {k: given[k].transpose(1, 2).contiguous().transpose(1, 2) for k in CACHES}
    testing.assert_same_bits(run(given | outside), run(given))
    for alone in CACHES:  # the strides of one are not those of the other
        testing.assert_same_bits(run(given | {alone: outside[alone]}), run(given))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    for dtype in (torch.float32, torch.bfloat16):
        given = FULL.arguments(device, dtype)
        testing.assert_same_bits_every_run(lambda given=given: run(given))


@pytest.mark.parametrize("plain", [False, True])
def test_is_a_well_formed_operator(plain, device):
    given = SMALL.arguments(device)
    if plain:
        needed = ("query", *CACHES, "block_table", "seqlens")
        given = {k: a if k in needed else None for k, a in given.items()} | {"softcap": 0.0}
    op = torch.ops.restore_ext.calibrated_attention_paged.default
    given |= {k: given[k].transpose(1, 2).contiguous().transpose(1, 2) for k in CACHES}
    torch.library.opcheck(op, tuple(given.values()))


def test_compiles(device):
    def layer(query, key_cache, value_cache, block_table, seqlens, log_size):
        return ops.calibrated_attention_paged(
            query * 2, key_cache, value_cache, block_table, seqlens, log_size=log_size,
            return_lse=True,
        )  # fmt: skip

    cases = (  # no two sizes alike: torch.compile would take them for one
        PagedCase(Hq=4, Hkv=2, Lq=7, D=32, page=18, lengths=(100, 140, 9)),
        PagedCase(Hq=6, Hkv=3, Lq=9, D=40, page=20, lengths=(100, 230, 9, 3, 8)),
    )
    testing.assert_compiles(layer, *[tuple(case.arguments(device).values())[:6] for case in cases])
