"""Every base method against its formula written out in loops (straight_line.py)."""

import pytest
import straight_line
import torch

from restore_ext import reduce_tokens
from restore_ext.methods import METHODS, find_method, holov, list_methods
from restore_ext.stages import STAGE_METHODS

LENGTHS = (1, 2, 3, 7, 16, 17, 24, 33, 40, 48)
# float32 cannot be held to a decision closer than this.
NEAR_TIE = 1e-5


def problem(N, C=8, *, seed=0, dtype=torch.float32, shared=None):
    """Features [1, N, C] and scores [1, N]; neighbours share something, as patches do."""
    generator = torch.Generator().manual_seed(1000 * seed + N)
    x = torch.randn(1, N, C, generator=generator) + 0.5
    x[:, 1:] += 0.7 * x[:, :-1]
    return x.to(dtype), torch.rand(1, N, generator=generator) ** 3


def budgets(N):
    return sorted({k for k in (1, 2, 5, N // 2, N - 1, N) if 1 <= k <= N})


def compare(x, keep, method, *, exact=False, **given):
    """Whether the two agree, or None where the formula itself is too close to call."""
    tally = straight_line.Tally()
    in_float64 = {
        name: value[0].double().numpy() if torch.is_tensor(value) else value
        for name, value in given.items()
    }
    wanted = straight_line.reduce(x[0].double().numpy(), keep, method, tally=tally, **in_float64)
    got = reduce_tokens(x, keep=keep, method=method, **given)
    if tally.closest < NEAR_TIE and not exact:
        return None
    assert got.position[0].tolist() == [c.position for c in wanted]
    assert got.kept[0].tolist() == [c.kept for c in wanted]
    assert got.merged[0].tolist() == [not c.kept for c in wanted]
    group = [-1] * x.shape[1]
    for m, cluster in enumerate(wanted):
        for i in cluster.members:
            group[i] = m
    assert got.group[0].tolist() == group
    for m, cluster in enumerate(wanted):
        assert got.size[0, m].item() == pytest.approx(cluster.size, rel=1e-6)
        # float32 inside and one rounding out
        token = torch.tensor(cluster.token)
        slack = token.abs() * torch.finfo(x.dtype).eps + 1e-6
        assert ((got.tokens[0, m].double() - token).abs() <= slack).all()
    return True


def compare_all(cases):
    """Compares every case, and sees to it that nearly all were."""
    results = [compare(*case, **given) for case, given in cases]
    assert results.count(None) <= 0.05 * len(results)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_reduces_as_the_formulas_say(method, restore):
    cases = []
    for N in LENGTHS:
        x, scores = problem(N)
        given = {"scores": scores, "restore": restore, "seed": N}
        cases += [((x, keep, method), given) for keep in budgets(N)]
    compare_all(cases)


@pytest.mark.parametrize("retain", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("anchor_mode", ["paper", "official", "uniform"])
def test_anchors_follow_their_mode_whatever_is_retained(anchor_mode, retain):
    cases = []
    for N in LENGTHS:
        x, _ = problem(N, seed=1)
        given = {"anchor_mode": anchor_mode, "retain": retain}
        cases += [((x, keep, "divprune"), given) for keep in budgets(N)]
    compare_all(cases)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vispruner", {"important_ratio": 0.0}),
        ("vispruner", {"important_ratio": 1.0}),
        ("vispruner", {"important_ratio": 0.3, "step": 1}),
        ("vispruner", {"step": 3}),
        ("vispruner", {"step": 1000}),
        ("holov", {"num_chunks": 1}),
        ("holov", {"num_chunks": 5}),
        ("holov", {"num_chunks": 1000}),
        ("visionzip", {"contextual_ratio": 0.01}),
        ("visionzip", {"contextual_ratio": 0.5}),
        ("visionzip", {"contextual_ratio": 1.0}),
        ("token_pooling", {"iterations": 1}),
        ("token_pooling", {"algorithm": "means"}),
        ("token_pooling", {"algorithm": "means", "iterations": 1}),
        ("tome", {"share": 0.1}),
        ("tome", {"share": 1.0}),
    ],
)
def test_options_do_what_the_formulas_say(method, options):
    cases = []
    for N in LENGTHS:
        x, scores = problem(N, seed=2)
        given = {"scores": scores, "restore": False, **options}
        cases += [((x, keep, method), given) for keep in budgets(N)]
    compare_all(cases)


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lowest_index(method):
    # Vectors along the axes: every similarity is -1, 0 or 1 exactly, and nearly all are shared.
    for N in (5, 12, 21):
        generator = torch.Generator().manual_seed(N)
        axis = torch.randint(0, 3, (N,), generator=generator)
        sign = torch.randint(0, 2, (N, 1), generator=generator) * 2.0 - 1
        x = (torch.eye(4)[axis] * sign)[None]
        scores = torch.full((1, N), 0.25)
        for keep in (1, 2, 4, N - 1):
            if method == "tome" and keep < 4:  # its means are exact only where a few merge
                continue
            compare(x, keep, method, scores=scores, restore=method == "tome", exact=True)


def test_clusters_break_ties_by_the_token_that_holds_them():
    # Whole numbers and weights that are powers of two: every distance and every cost is exact.
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        N = int(torch.randint(4, 12, (1,), generator=generator))
        x = torch.randint(0, 9, (1, N, 1), generator=generator).float()
        scores = 0.5 ** torch.randint(1, 4, (1, N), generator=generator).float()
        for keep in (2, 3):
            compare(x, keep, "token_pooling", scores=scores, exact=True)
    for x, heavy, keep in (
        ([8, 0, 7, 5, 7, 2], [0, 3, 4], 3),
        ([7, 0, 0, 5, 4, 8, 5], [4, 6], 2),
        ([7, 5, 0, 3, 8, 4, 2, 8], [3, 5], 2),
    ):
        x = torch.tensor(x).float().view(1, -1, 1)
        scores = torch.full((1, x.shape[1]), 0.25)
        scores[:, heavy] = 0.5
        compare(x, keep, "token_pooling", scores=scores, algorithm="means", exact=True)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_anchor_ties_go_to_the_lowest_index(mode):
    x = torch.eye(4)[torch.tensor([0, 1, 0, 2, 1, 1, 3, 0, 2])][None]
    for keep in range(1, 9):
        compare(x, keep, "uniform", anchor_mode=mode, exact=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "tome"])
def test_low_precision_decides_in_float32(method, dtype):
    cases = []
    for N in LENGTHS:
        x, scores = problem(N, seed=3, dtype=dtype)
        cases += [((x, keep, method), {"scores": scores}) for keep in budgets(N)]
    compare_all(cases)


@pytest.mark.parametrize("method", METHODS)
def test_sizes_weigh_in(method):
    cases = []
    for N in LENGTHS:
        x, scores = problem(N, seed=4)
        size = 1.0 + torch.arange(N)[None].float() % 3
        cases += [((x, keep, method), {"scores": scores, "size": size}) for keep in budgets(N)]
    compare_all(cases)


@pytest.mark.parametrize("method", METHODS)
def test_the_base_compares_the_metric_and_the_anchors_the_features(method):
    cases = []
    for N in LENGTHS:
        x, scores = problem(N, seed=5)
        metric, _ = problem(N, C=5, seed=6)
        cases += [((x, keep, method), {"scores": scores, "metric": metric}) for keep in budgets(N)]
    compare_all(cases)


@pytest.mark.parametrize("method", METHODS)
def test_every_budget_is_met_exactly(method):
    for N in range(1, 20):
        x, scores = problem(N, C=3, seed=7)
        for keep in range(1, N + 1):
            r = reduce_tokens(x, keep=keep, method=method, scores=scores, restore=False)
            assert r.position.shape == (1, keep)
            assert len(set(r.position[0].tolist())) == keep
            assert set(r.position[0].tolist()) <= set(range(N))


def test_holov_weighs_variance_where_it_counts():
    # The scale divides by the chunk's own variance, so that variance only shows where it is about
    # 1e-6: in chunks of tokens at right angles, some a little off.
    generator = torch.Generator().manual_seed(0)
    for N, chunks in ((12, 3), (11, 3), (14, 4), (5, 5)):
        tilt = 10.0 ** torch.linspace(-4, -1, N)[:, None]
        x = torch.eye(16)[:N] + tilt * torch.rand(N, 16, generator=generator)
        scores = torch.rand(N, generator=generator)
        chunk, place, mask = holov._chunks(N, chunks, x.device)
        padded = torch.zeros(1, *mask.shape)
        padded[:, chunk, place] = scores
        got = holov._weights(x[None], padded, chunk, place, mask)[0]
        for c in range(chunks):
            here = (chunk == c).nonzero().flatten().tolist()
            wanted = straight_line.chunk_weight(x.double().numpy(), scores.tolist(), here)
            assert got[c].item() == pytest.approx(wanted, rel=1e-5)


def test_holov_takes_a_chunk_whole_and_hands_the_rest_on():
    # All attention on the last of three chunks, then on the first: 4 + 3, nothing from the middle.
    scores = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9]])
    x, _ = problem(12)
    r = reduce_tokens(x, keep=7, method="holov", scores=scores, restore=False, num_chunks=3)
    assert r.position[0].tolist() == [0, 1, 2, 8, 9, 10, 11]


def test_holov_without_any_attention_shares_evenly():
    x, _ = problem(12)
    for scores in (torch.zeros(1, 12), torch.full((1, 12), -1.0)):
        r = reduce_tokens(x, keep=6, method="holov", scores=scores, restore=False, num_chunks=3)
        assert r.position[0].tolist() == [0, 1, 4, 5, 8, 9]


def test_holov_gives_nothing_to_a_chunk_of_negative_weight():
    cases = []
    for N in LENGTHS:
        x, scores = problem(N, seed=8)
        given = {"scores": scores - 0.2, "restore": False, "num_chunks": 6}
        cases += [((x, keep, "holov"), given) for keep in budgets(N)]
    compare_all(cases)


def test_random_picks_depend_on_seed_and_length_alone():
    def picks(x, seed, keep=6):
        return reduce_tokens(x, keep=keep, method="random", restore=False, seed=seed).position

    one, _ = problem(30)
    many = torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(picks(many, 5), picks(one, 5).expand(3, 6))
    assert not torch.equal(picks(one, 5), picks(one, 6))
    assert set(picks(one, 5)[0].tolist()) < set(picks(one, 5, keep=7)[0].tolist())
    assert torch.equal(picks(one, -1), picks(one, 2**64 - 1))


def test_random_favours_no_token():
    x = torch.ones(1, 10, 1)
    counts = torch.zeros(10)
    for seed in range(1000):
        r = reduce_tokens(x, keep=3, method="random", restore=False, seed=seed)
        counts[r.position[0]] += 1
    # 1000 draws of 3 in 10: mean 300, standard deviation 14.5
    assert (counts - 300).abs().max() < 5 * 14.5


def test_uniform_picks_the_middles_of_equal_parts():
    x = torch.ones(1, 12, 1)
    for keep, wanted in ((1, [6]), (2, [3, 9]), (4, [1, 4, 7, 10]), (5, [1, 3, 6, 8, 10])):
        r = reduce_tokens(x, keep=keep, method="uniform", restore=False)
        assert r.position[0].tolist() == wanted


def test_tome_merges_with_and_without_restore():
    x, _ = problem(20)
    plain, restored = (reduce_tokens(x, keep=9, method="tome", restore=r) for r in (False, True))
    assert torch.equal(plain.tokens, restored.tokens)
    assert torch.equal(plain.group, restored.group)
    assert (plain.group >= 0).all() and plain.size.sum() == 20
    assert torch.equal(plain.merged, plain.size > 1)


def test_the_table_of_methods_answers_by_name():
    projected = "random uniform divprune fastervlm vispruner holov visionzip tome token_pooling"
    assert list_methods() == [*projected.split(), "tome_vit", "downsample", *STAGE_METHODS]
    with pytest.raises(ValueError, match=r"method must be one of random, .*, tome, .* got 'dart'"):
        find_method("dart")
