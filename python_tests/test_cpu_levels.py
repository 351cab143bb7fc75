"""The CPU operators mean the same at every level of instructions that this processor runs, and with
RESTORE_EXT_LIBRARY=<what tools/lowered.py prints> at those with AVX-512 too."""

import os

import pytest
import torch

from restore_ext import _C, ops, testing
from restore_ext.testing import attention, paged, row_scores, tokens
from restore_ext.testing.attention import AttentionCase
from restore_ext.testing.paged import PagedCase
from restore_ext.testing.row_scores import RowScoresCase
from restore_ext.testing.tokens import TokenCase

LEVELS = ["generic", "avx2", "avx512", "avx512_bf16"]


def runs(level: str) -> bool:
    return level in _C.cpu_levels.split()


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    if not runs(request.param):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("RESTORE_EXT_CPU", request.param)
    return request.param


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", attention.CASES, ids=str)
def test_attention(case, dtype, level):
    given = case.arguments("cpu", dtype)
    attention.assert_within_twice_sdpa(ops.calibrated_attention(**given, return_lse=True), given)


def test_products_of_pairs_cost_little(level):
    """Weights rounded to bfloat16: not much to the one rounding that every output takes."""
    given = AttentionCase(Hq=8, Hkv=8, Lq=300, Lk=300, D=64).arguments("cpu", torch.bfloat16)
    (exact, _), (plain, _) = attention.truth(given), attention.by_sdpa(given)
    ours = ops.calibrated_attention(**given)
    ratio = ((ours - exact).abs().mean() / (plain - exact).abs().mean()).item()
    if level == "avx512_bf16":
        assert 1.02 < ratio < 1.1, "weights are not rounded to nearest, or not at all"
    else:
        assert ratio < 1.01


def test_the_weights_of_a_row_sum_to_one(level):
    """All but one of the weights lose as much as rounding to bfloat16 can take: 1 / 256."""
    weight = torch.full((1, 60), 0.5 * (1 + 0.95 / 256))
    weight[0, 7] = 1
    key = torch.ones(1, 1, 60, 32, dtype=torch.bfloat16)
    query = torch.zeros(1, 1, 50, 32, dtype=torch.bfloat16)
    out = ops.calibrated_attention(query, key, key, log_size=weight.log(), causal=False)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize(
    ("query", "key", "scale", "logit"),
    [(2.0**-130, 2.0**126, 1.0, 2.0), (2.0**-70, 2.0**-70, 2.0**127, 2.0**-8)],
    ids=["numbers", "products"],
)
def test_subnormals_of_bfloat16(query, key, scale, logit, level):
    """Zeros where bfloat16 is multiplied in pairs, as its instruction has it; else numbers."""
    q = torch.full((1, 1, 50, 32), query, dtype=torch.bfloat16)
    k = torch.full((1, 1, 1, 32), key, dtype=torch.bfloat16)
    _, lse = ops.calibrated_attention(q, k, k, causal=False, scale=scale, return_lse=True)
    assert torch.equal(lse, torch.full_like(lse, 0 if level == "avx512_bf16" else logit))


@pytest.mark.skipif(not runs("avx512_bf16"), reason="this processor has no avx512_bf16")
def test_the_odd_product_of_a_pair_is_added_first(monkeypatch):
    """And rounded before the even one is: 1 + 2^-25 - 1 is 0. So a lowered level has to do it."""
    monkeypatch.setenv("RESTORE_EXT_CPU", "avx512_bf16")
    q, k = torch.zeros(1, 1, 50, 32, dtype=torch.bfloat16), torch.ones(1, 1, 1, 32).bfloat16()
    q[..., :4] = torch.tensor([1, 0, -1, 2.0**-25])
    _, lse = ops.calibrated_attention(q, k, k, causal=False, scale=2.0**25, return_lse=True)
    assert torch.equal(lse, torch.zeros_like(lse))


def test_what_was_packed_before_is_not_read(level):
    """The last of an odd number of keys makes a pair with nothing, whatever lay there."""
    given = AttentionCase(B=2, Hq=2, Hkv=2, Lq=61, Lk=61, D=64).arguments("cpu", torch.bfloat16)
    expected = ops.calibrated_attention(**given)[1]
    given["key"][0] = torch.nan
    given["value"][0] = torch.nan
    assert torch.equal(ops.calibrated_attention(**given)[1], expected)


def test_the_logarithm_of_distances(level):
    """Queries of zeros and one key: the log-sum-exp is log(2 - rho) itself."""
    spread = torch.linspace(-9, 1, 4000).exp2()
    table = torch.cat([2 - spread, 1 + spread / 500, 1 - spread / 500])
    special = [2.0, 1.0, 0.0, -1.0, 3.0, torch.nan, 2 - 2**-23, 2 - 2**-22, 1 + 2**-23]
    table = torch.cat([table, torch.tensor(special)])
    count = len(table)
    for axes in (1, 2):
        _, lse = ops.calibrated_attention(
            torch.zeros(1, 1, count, 32),
            torch.zeros(1, 1, 1, 32),
            torch.zeros(1, 1, 1, 32),
            query_position=torch.arange(count, dtype=torch.int32)[None],
            key_position=torch.zeros(1, 1, dtype=torch.int32),
            decay=torch.stack([table / axes] * axes),
            causal=False,
            return_lse=True,
        )
        expected = (2 - table).double().log().float()
        torch.testing.assert_close(lse[0, 0], expected, rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("Lq", [1, 2, 3, 5, 7])
def test_attention_of_few_queries(Lq, level):
    """Rows in fours, in twos and one by one; more than one stretch of keys, the last not full."""
    for D in (32, 40, 72, 128):
        given = AttentionCase(B=2, Hq=6, Hkv=2, Lq=Lq, Lk=1100, D=D, holes=D == 72).arguments()
        attention.assert_within_twice_sdpa(
            ops.calibrated_attention(**given, return_lse=True), given
        )


def test_attention_over_more_keys_than_a_stretch(level):
    given = AttentionCase(Hq=10, Hkv=2, Lq=50, Lk=2600, D=32, ranges="image").arguments()
    attention.assert_within_twice_sdpa(ops.calibrated_attention(**given, return_lse=True), given)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", paged.CASES, ids=str)
def test_attention_over_pages(case, dtype, level):
    given = case.arguments("cpu", dtype)
    answer = ops.calibrated_attention_paged(**given, return_lse=True)
    attention.assert_within_twice_sdpa(answer, paged.contiguous(given))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_cache_in_one_page_is_a_cache_in_a_row(dtype, level):
    """The same loops over the same keys, some of them padding: bit for bit."""
    case = PagedCase(page=256, lengths=(250, 600), holes=True, P=64, positions="merged", axes=3)
    given = case.arguments("cpu", dtype)
    out, lse = ops.calibrated_attention_paged(**given, return_lse=True)
    for b in range(2):
        own = ("query", "query_position", "block_table", "seqlens")
        row = {k: given[k][b, None] for k in own}
        row = paged.contiguous(given | row)
        expected = ops.calibrated_attention(**row, return_lse=True)
        testing.assert_same_bits((out[b, None], lse[b, None]), expected)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", row_scores.CASES, ids=str)
def test_row_scores(case, dtype, level):
    given = case.arguments("cpu", dtype)
    row_scores.assert_within_twice_torch(ops.row_scores(**given), given)


@pytest.mark.parametrize("case", [*tokens.CASES, TokenCase(N=613, C=600, k=100)], ids=str)
def test_indices(case, level):
    x, valid = case.x(), case.valid()
    anchors = ops.select_anchors(x, case.k, valid=valid)
    tokens.check_select_anchors(anchors, x, case.k, valid=valid)
    picks = ops.select_diverse(x, case.k, valid=valid)
    tokens.check_select_diverse(picks, x, case.k, valid=valid)
    matched = ops.match_bipartite(x, case.k, valid=valid)
    tokens.check_match_bipartite(matched, x, case.k, valid=valid)


def test_any_number_of_threads_gives_the_same_bits(level):
    x = TokenCase(N=400, C=256).x()
    long = AttentionCase(Hq=10, Hkv=2, Lq=100, Lk=1300, D=64).arguments()
    short = AttentionCase(Hq=10, Hkv=2, Lq=1, Lk=1300, D=64).arguments()
    pages = PagedCase(Hq=10, lengths=(1300, 40), P=64, axes=3, positions="merged").arguments()
    many = PagedCase(Hq=10, Lq=40, lengths=(300, 80)).arguments()
    rows = [RowScoresCase(Hq=10, Hkv=2, Lq=L, Lk=1300, D=64).arguments() for L in (1, 100)]
    for fn in (
        lambda: ops.row_scores(**rows[0]),
        lambda: ops.row_scores(**rows[1]),
        lambda: ops.match_bipartite(x, 50),
        lambda: ops.score_anchors(x),
        lambda: ops.select_diverse(x, 20),
        lambda: ops.calibrated_attention(**long, return_lse=True),
        lambda: ops.calibrated_attention(**short, return_lse=True),
        lambda: ops.calibrated_attention_paged(**pages, return_lse=True),
        lambda: ops.calibrated_attention_paged(**many, return_lse=True),
    ):
        testing.assert_same_bits_every_run(fn)


@pytest.mark.skipif("RESTORE_EXT_LIBRARY" not in os.environ, reason="of tools/lowered.py's library")
def test_a_lowered_library_runs_all_levels():
    assert _C.__file__.endswith(os.environ["RESTORE_EXT_LIBRARY"])
    assert _C.cpu_levels.split() == LEVELS


def test_an_unknown_level_is_named(monkeypatch):
    monkeypatch.setenv("RESTORE_EXT_CPU", "mmx")
    with pytest.raises(RuntimeError, match=r"RESTORE_EXT_CPU must be one of .*generic.*, got mmx"):
        ops.score_anchors(torch.ones(1, 2, 2))
