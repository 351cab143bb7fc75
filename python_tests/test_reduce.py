"""reduce_tokens and Reduction: what is promised whatever the method."""

import pytest
import torch

from restore_ext import Reduction, ops, reduce_tokens
from restore_ext.methods import METHODS
from restore_ext.reduce import ANCHOR_MODES

FIELDS = ("tokens", "size", "position", "group", "kept", "merged")


def problem(B=2, N=21, C=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, C, generator=generator) + 0.3
    return x.to(dtype), torch.rand(B, N, generator=generator)


def assert_same(a: Reduction, b: Reduction):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def row(r: Reduction, b: int) -> Reduction:
    """One row of a batch, without its padding."""
    m = int(r.valid[b].sum())
    assert r.valid[b, :m].all()  # padding is on the right
    cut = {name: getattr(r, name)[b : b + 1, :m] for name in FIELDS if name != "group"}
    return Reduction(group=r.group[b : b + 1], **cut)


def lower_median(members):
    return sorted(members)[(len(members) - 1) // 2]


@pytest.mark.parametrize("anchor_mode", ANCHOR_MODES)
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_fields_tell_one_story(method, restore, anchor_mode):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, scores = problem(dtype=dtype)
        size = 1.0 + torch.arange(42).view(2, 21).float() % 4
        for keep in (1, 2, 9, 20):
            r = reduce_tokens(
                x, keep=keep, method=method, scores=scores, size=size, restore=restore,
                anchor_mode=anchor_mode,
            )  # fmt: skip
            assert r.tokens.dtype == dtype and r.tokens.shape == (2, keep, 6)
            assert r.size.dtype == torch.float32 and r.position.dtype == torch.int64
            assert (r.position[:, 1:] > r.position[:, :-1]).all()
            assert torch.equal(r.kept, ~r.merged)
            for b in range(2):
                for m in range(keep):
                    members = (r.group[b] == m).nonzero().flatten().tolist()
                    assert r.position[b, m] == lower_median(members)
                    assert r.size[b, m] == size[b, members].sum()
                    if r.kept[b, m]:
                        assert len(members) == 1
                        assert torch.equal(r.tokens[b, m], x[b, members[0]])
            if restore or METHODS[method].merge is not None:
                assert (r.group >= 0).all()
                assert torch.equal(r.size.sum(1), size.sum(1))
            else:
                assert r.kept.all() and ((r.group >= 0).sum(1) == keep).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_is_large_enough_changes_no_bit(method):
    x, scores = problem()
    size = scores + 1
    for keep in ({"keep": 21}, {"keep": 500}, {"keep_ratio": 1.0}):
        r = reduce_tokens(x, method=method, scores=scores, **keep)
        assert torch.equal(r.tokens, x) and (r.size == 1).all()
        assert torch.equal(r.position, torch.arange(21).expand(2, 21))
        assert torch.equal(r.group, r.position) and r.kept.all() and not r.merged.any()
    r = reduce_tokens(x, method=method, scores=scores, size=size, keep=21)
    assert torch.equal(r.size, size)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_images_and_every_run_is_the_same(method):
    x, scores = problem(B=4, N=30)
    together = reduce_tokens(x, keep=8, method=method, scores=scores)
    assert_same(together, reduce_tokens(x, keep=8, method=method, scores=scores))
    for b in range(4):
        one = slice(b, b + 1)
        alone = reduce_tokens(x[one], keep=8, method=method, scores=scores[one])
        assert_same(row(together, b), alone)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_ragged_row_is_the_image_without_its_padding(method, restore):
    x, scores = problem(B=6)
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(6, 21, generator=generator) < 0.7
    valid[3] = True
    valid[4] = False
    valid[5] = valid[0]
    size = torch.randint(1, 4, (6, 21), generator=generator).float()
    metric = torch.randn(6, 21, 4, generator=generator)
    for name, tensor in (("features", x), ("metric", metric), ("scores", scores), ("size", size)):
        assert tensor[~valid].numel(), name
        tensor[~valid] = float("nan")
    keep = [4, 1, 30, 7, 5, 4]
    given = {"method": method, "restore": restore}
    r = reduce_tokens(x, keep=keep, valid=valid, metric=metric, scores=scores, size=size, **given)
    assert r.tokens.shape[1] == int(valid[2].sum())
    for b in range(6):
        here = valid[b].nonzero().flatten()
        if not len(here):
            assert not r.valid[b].any() and (r.group[b] == -1).all()
            continue
        alone = reduce_tokens(
            x[b : b + 1, here], keep=keep[b], metric=metric[b : b + 1, here],
            scores=scores[b : b + 1, here], size=size[b : b + 1, here], **given,
        )  # fmt: skip
        part = row(r, b)
        group = torch.full((1, 21), -1)
        group[0, here] = alone.group
        mapped = Reduction(
            alone.tokens, alone.size, here[alone.position], group, alone.kept, alone.merged
        )
        assert_same(part, mapped)
        padded = slice(part.position.shape[1], None)
        assert not r.tokens[b, padded].any() and not r.size[b, padded].any()
        assert (r.position[b, padded] == -1).all()
        assert not r.kept[b, padded].any() and not r.merged[b, padded].any()


def test_a_budget_may_come_in_any_whole_number():
    x, _ = problem(B=3)
    one = reduce_tokens(x, keep=5, method="divprune")
    for keep in (torch.tensor(5), [5, 5, 5], (5, 5, 5), torch.tensor([5, 5, 5])):
        assert_same(one, reduce_tokens(x, keep=keep, method="divprune"))


def test_a_ratio_is_of_the_valid_tokens():
    x, _ = problem(B=3)
    valid = torch.arange(21) < torch.tensor([[21], [10], [1]])
    r = reduce_tokens(x, keep_ratio=0.3, method="uniform", valid=valid)
    assert r.valid.sum(1).tolist() == [6, 3, 1]
    r = reduce_tokens(x, keep_ratio=0.001, method="uniform")
    assert r.position.shape == (3, 1)


def test_an_empty_batch_and_an_empty_image_are_fine():
    for shape in ((0, 9, 4), (2, 0, 4)):
        x = torch.empty(shape)
        r = reduce_tokens(x, keep=3, method="divprune")
        assert r.tokens.shape == (shape[0], 0, 4) and r.group.shape == shape[:2]
        assert r.merge(x).shape == (shape[0], 0, 4)
        assert r.compose(reduce_tokens(r.tokens, keep=2, method="tome")).size.shape == (shape[0], 0)
    r = reduce_tokens(torch.ones(2, 5, 4), keep=3, method="tome", valid=torch.zeros(2, 5) > 0)
    assert r.tokens.shape == (2, 0, 4) and (r.group == -1).all()


def test_retain_sets_how_many_pass_untouched():
    x, scores = problem()
    for retain, kept in ((0, 0), (0.25, 2), (0.5, 4), (1, 9)):
        r = reduce_tokens(x, keep=9, scores=scores, retain=retain)
        assert (r.kept.sum(1) == kept).all() and (r.merged.sum(1) == 9 - kept).all()
    plain = reduce_tokens(x, keep=9, scores=scores, restore=False)
    assert_same(r, plain)  # retain = 1 leaves no anchors, so the rest is dropped


def test_the_anchor_modes_differ():
    x, scores = problem(N=60)
    paper, official, uniform = (
        reduce_tokens(x, keep=20, scores=scores, anchor_mode=m) for m in ANCHOR_MODES
    )
    assert not torch.equal(paper.group, official.group)
    assert not torch.equal(paper.group, uniform.group)


@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_budget_compiles_into_one_graph(method):
    x, scores = problem()
    given = {"keep": 6, "method": method, "check_finite": False}
    torch.compiler.reset()  # the methods share a function, and it may be compiled only so often
    compiled = torch.compile(reduce_tokens, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, scores=scores, **given), reduce_tokens(x, scores=scores, **given))


def test_views_are_read_like_their_copies():
    x, scores = problem(C=12)
    wide = torch.full((2, 21, 24), float("nan"))
    wide[..., ::2] = x
    columns = torch.full((21, 2, 3), float("nan"))
    columns[..., 1] = scores.T
    got = reduce_tokens(wide[..., ::2], keep=6, scores=columns[..., 1].T)
    assert_same(got, reduce_tokens(x, keep=6, scores=scores))


def test_without_the_check_a_bad_vector_ranks_last():
    x, scores = problem(B=1)
    x[0, 4, 0] = float("nan")
    r = reduce_tokens(
        x, keep=6, scores=scores, method="divprune", restore=False, check_finite=False
    )
    assert r.group[0, 4] == -1


def bad(**given):
    x, scores = problem()
    return {"features": x, "keep": 5, "scores": scores, **given}


def nan_at(x, *at, value=float("nan")):
    x = x.clone()
    x[at] = value
    return x


X, SCORES = problem()
INF = float("inf")

REFUSED = {
    "method of a tower": (
        bad(method="downsample"), ValueError, "method downsample acts on the picture, .* attach",
    ),
    "contextual_ratio 0": (
        bad(method="visionzip", contextual_ratio=0), ValueError, r"must be in \(0, 1\], got 0",
    ),
    "algorithm": (
        bad(method="token_pooling", algorithm="mean"), ValueError, "one of medoids, means, got",
    ),
    "no budget": (bad(keep=None), ValueError, "exactly one of keep and keep_ratio, got neither"),
    "two budgets": (bad(keep_ratio=0.5), ValueError, "got keep=5 and keep_ratio=0.5"),
    "keep 0": (bad(keep=0), ValueError, "keep must be an int >= 1, got 0"),
    "keep -3": (bad(keep=-3), ValueError, "keep must be an int >= 1, got -3"),
    "keep True": (bad(keep=True), TypeError, "keep must be an int, got True"),
    "keep 5.0": (bad(keep=5.0), TypeError, "keep must be an int, got 5.0"),
    "keep of other length": (bad(keep=[5]), ValueError, "one per image, B = 2, got 1"),
    "keep with a zero": (bad(keep=[5, 0]), ValueError, r"keep\[1\] must be an int >= 1, got 0"),
    "keep with a bool": (bad(keep=[5, True]), TypeError, r"keep\[1\] must be an int, got True"),
    "keep float tensor": (bad(keep=torch.ones(2)), TypeError, "got a tensor of torch.float32"),
    "keep bool tensor": (bad(keep=torch.ones(2) > 0), TypeError, "got a tensor of torch.bool"),
    "keep 2-D": (bad(keep=torch.tensor([[5, 5]])), ValueError, r"= \[2\], got \[1, 2\]"),
    "ratio 0": (bad(keep=None, keep_ratio=0.0), ValueError, r"keep_ratio must be in \(0, 1\], got"),
    "ratio 1.1": (bad(keep=None, keep_ratio=1.1), ValueError, r"keep_ratio must be in \(0, 1\]"),
    "ratio NaN": (bad(keep=None, keep_ratio=float("nan")), ValueError, "keep_ratio .* got nan"),
    "ratio True": (bad(keep=None, keep_ratio=True), TypeError, "keep_ratio must be a float"),
    "method": (bad(method="dart"), ValueError, "method must be one of random, .*, got 'dart'"),
    "no scores": (bad(scores=None), ValueError, "scores must be given for method vispruner"),
    "no scores, all fit": (
        bad(scores=None, keep=99, method="holov"), ValueError, "given for method holov",
    ),
    "features list": (bad(features=[[1.0]]), TypeError, "features must be a tensor, got list"),
    "features float64": (bad(features=X.double()), TypeError, "features must be .* got .*float64"),
    "features 2-D": (bad(features=X[0]), ValueError, r"features .* \[B, N, C\] .* got \[21, 6\]"),
    "features C=0": (bad(features=X[..., :0]), ValueError, "features .* C >= 1"),
    "scores shape": (bad(scores=SCORES[:, 1:]), ValueError, r"scores .* \[2, 21\], got \[2, 20\]"),
    "scores int": (bad(scores=SCORES.long()), TypeError, "scores must be .* got torch.int64"),
    "metric shape": (bad(metric=X[:, 1:]), ValueError, r"metric .* \[2, 21, C\], got \[2, 20, 6\]"),
    "metric int": (bad(metric=X.long()), TypeError, "metric must be .* got torch.int64"),
    "metric meta": (bad(metric=X.to("meta")), ValueError, "metric must be on cpu .* got meta"),
    "valid int": (bad(valid=SCORES.long()), TypeError, "valid must be torch.bool, got torch.int64"),
    "valid shape": (bad(valid=SCORES[:1] > 0), ValueError, r"valid .* \[2, 21\], got \[1, 21\]"),
    "size half": (bad(size=SCORES.half()), TypeError, "size must be torch.float32"),
    "size shape": (bad(size=SCORES.T), ValueError, r"size .* \[2, 21\], got \[21, 2\]"),
    "size 0": (bad(size=SCORES * 0), ValueError, "size must be finite and positive"),
    "retain 1.5": (bad(retain=1.5), ValueError, r"retain must be in \[0, 1\], got 1.5"),
    "retain None": (bad(retain=None), TypeError, "retain must be a float, got None"),
    "restore 1": (bad(restore=1), TypeError, "restore must be True or False, got 1"),
    "anchor_mode": (bad(anchor_mode="both"), ValueError, "anchor_mode .* paper, official, uni"),
    "seed": (bad(seed=0.5), TypeError, "seed must be an int, got 0.5"),
    "check_finite": (bad(check_finite="no"), TypeError, "check_finite must be True or False"),
    "NaN feature": (
        bad(features=nan_at(X, 1, 3, 2)), ValueError, r"features .* got nan at \[b, n\] = \[1, 3\]",
    ),
    "Inf metric": (
        bad(metric=nan_at(X, 0, 7, value=INF)), ValueError, r"metric .* inf .* \[0, 7\]",
    ),
    "NaN score": (bad(scores=nan_at(SCORES, 1, 20)), ValueError, r"scores .* nan .* \[1, 20\]"),
    "option of none": (bad(method="uniform", step=2), TypeError, "uniform has no option 'step'"),
    "unknown option": (
        bad(stpe=2), TypeError, "vispruner has no option 'stpe'; .* important_ratio, step",
    ),
    "step 0": (bad(step=0), ValueError, "step must be an int >= 1, got 0"),
    "important_ratio 2": (bad(important_ratio=2), ValueError, "important_ratio must be in"),
    "num_chunks 1.5": (bad(method="holov", num_chunks=1.5), TypeError, "num_chunks must be an int"),
    "share 0": (bad(method="tome", share=0), ValueError, r"share must be in \(0, 1\], got 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_says_what_is_wrong(what):
    given, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        reduce_tokens(**given)


def test_what_is_wrong_is_found_before_any_work(monkeypatch):
    def never(*_, **__):
        raise AssertionError("work was begun")

    for op in ("select_anchors", "merge_tokens", "match_bipartite"):
        monkeypatch.setattr(ops, op, never)
    with pytest.raises(AssertionError, match="work was begun"):
        reduce_tokens(**bad())
    for what in ("anchor_mode", "step 0", "NaN score", "size 0"):
        given, error, message = REFUSED[what]
        with pytest.raises(error, match=message):
            reduce_tokens(**given)
