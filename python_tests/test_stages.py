"""The methods that cut inside the language model, without a model: counts, choices, options."""

import json
import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import straight_line
import straight_stages
import torch
from test_no_host_sync import NoNumbers, OneDevice

from restore_ext.hf.step import PlannedStage, make_step, plan_stages
from restore_ext.hf.view import View
from restore_ext.stages import (
    STAGE_METHODS,
    Candidates,
    Request,
    make_stages,
    read_schedule,
)
from restore_ext.stages.sparsevlm import PUBLISHED_KEEPS, dpc_knn

DEPTH = 32


def stages(method, *, depth=DEPTH, keep=None, keep_ratio=None, retain=0.5, mode="paper", **options):
    return make_stages(method, Request(depth, keep, keep_ratio, retain, mode), options)


def counts(method, n=576, **given):
    """(layer, tokens left of an image of n) of every stage."""
    found, now = [], n
    for stage in stages(method, **given):
        now = stage.counts(n, now)[0]
        found.append((stage.layer, now))
    return found


def candidates(stage, lengths, *, seed=0, C=6, tie=False):
    """Images of these lengths before a cut, padded with what must not matter."""
    generator = torch.Generator().manual_seed(seed)
    N = max(lengths)
    valid = torch.arange(N) < torch.tensor(lengths)[:, None]
    scores = torch.rand(len(lengths), N, generator=generator)
    scores = (scores * 3).round() if tie else scores
    x = torch.randn(len(lengths), N, C, generator=generator)
    columns = list(zip(*[stage.counts(n, n) for n in lengths], strict=True))
    return Candidates(
        scores.masked_fill(~valid, 9.0),
        valid,
        torch.ones_like(scores),
        tuple(torch.tensor(column) for column in columns),
        tuple(map(max, columns)),
        lambda: x.masked_fill(~valid[..., None], 7.0),
    )


def groups(stage, tokens) -> list[list[list[int]]]:
    """Of every image, the members of each token left, in the order of their lower medians."""
    group = stage.select(tokens)
    found = []
    for row, valid in zip(group, tokens.valid, strict=True):
        members = {}
        for i, g in enumerate(row[valid].tolist()):
            members.setdefault(g, []).append(i)
        members.pop(-1, None)
        assert sorted(members) == list(range(len(members)))
        found.append(sorted(members.values(), key=lambda m: m[(len(m) - 1) // 2]))
    return found


LENGTHS = [17, 1, 2, 9, 40]


def test_published_defaults():
    assert counts("fastv") == [(2, 288)]
    assert counts("fastv", keep_ratio=0.25) == [(2, 144)]
    assert counts("pyramiddrop") == [(8, 288), (16, 144), (24, 72)]
    assert counts("pyramiddrop", depth=40) == [(10, 288), (20, 144), (30, 72)]
    assert counts("vtw") == [(15, 0)]
    assert counts("vtw", depth=28) == [(13, 0)]
    assert counts("adsc_style") == [(8, 288), (16, 144)]
    for budget, keeps in PUBLISHED_KEEPS.items():
        found = counts("sparsevlm", keep=budget, merge=False)
        assert found == list(zip((3, 7, 16), keeps, strict=True))
    assert counts("sparsevlm", merge=False) == counts("sparsevlm", keep=192, merge=False)


def test_published_recycling():
    """300 of 576 stay; of 276 that go, int(82.8) + 1 = 83 are clustered into int(8.3) + 1 = 9."""
    first, _, _ = stages("sparsevlm", keep=192)
    assert first.counts(576, 576) == (309, 300, 83, 9)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 17, 100])
def test_budgets_are_met_at_the_last_cut_and_never_rise(n):
    for keep in {1, 2, n // 2 or 1, n, n + 5}:
        for method in ("fastv", "pyramiddrop"):
            left = [count for _, count in counts(method, n, keep=keep)]
            assert left[-1] == min(keep, n)
            assert left == sorted(left, reverse=True)
        left = [count for _, count in counts("sparsevlm", n, keep=keep)]
        assert left == sorted(left, reverse=True) and left[-1] >= 1


def test_counts_are_those_of_the_formulas():
    """In fractions, for images of odd sizes and budgets of one token, of all, and of any."""
    generator = random.Random(0)
    for _ in range(100):
        n = generator.choice([1, 2, 3, 17, 49, 64, 575, 576, generator.randint(1, 2000)])
        keep = generator.choice([1, n, min(8, n), generator.randint(1, n)])
        share = Fraction(keep, n)
        assert [left for _, left in counts("fastv", n, keep=keep)] == [keep]
        ratio = generator.randint(1, 200) / 200
        [(_, left)] = counts("fastv", n, keep_ratio=ratio)
        exact = Fraction(ratio) * n
        if abs(exact - math.floor(exact) - Fraction(1, 2)) > 1e-9:
            assert left == straight_stages.fastv_count(n, Fraction(ratio))
        left = [left for _, left in counts("pyramiddrop", n, keep=keep)]
        assert left == straight_stages.pyramiddrop_counts(n, share, 3)
        made, now = stages("sparsevlm", keep=keep, recycle=0.25, cluster=4), n
        for cut, (stay, clusters) in zip(
            made, straight_stages.sparsevlm_counts(n, share, Fraction(1, 4), 4), strict=True
        ):
            after, kept, _, made_of = cut.counts(n, now)
            assert (after, kept, made_of) == (stay + clusters, stay, clusters)
            now = after
        if keep < n:
            [stage] = stages("fastv", keep=keep, merge=True, retain=0.3)
            retained = math.floor(Fraction(3, 10) * keep)
            assert stage.counts(n, n) == (keep, retained, keep - retained)


def test_a_schedule_cuts_where_an_entry_is_below_the_one_before():
    assert counts("schedule", 100, depth=6, layers=[100, 100, 60, None, 60, 5]) == [(2, 60), (5, 5)]
    assert counts("schedule", 30, depth=3, layers=[1.0, 0.5, 0.0]) == [(1, 15), (2, 0)]
    assert counts("schedule", 3, depth=3, layers=[1.0, 0.1, 0.1]) == [(1, 1)]
    assert counts("schedule", 4, depth=3, layers=[9, 6, 1]) == [(1, 4), (2, 1)]


@pytest.mark.parametrize("keep", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("tie", [False, True])
def test_scores_decide_and_ties_go_to_the_lowest_index(keep, tie):
    [stage] = stages("fastv", keep=keep)
    tokens = candidates(stage, LENGTHS, tie=tie)
    for row, n in enumerate(LENGTHS):
        scores = tokens.scores[row, :n].tolist()
        want = straight_stages.highest(scores, min(keep, n))
        assert groups(stage, tokens)[row] == [[i] for i in want]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.5, 0.99])
def test_even_tokens_are_middles_of_equal_parts(share):
    [stage] = stages("schedule", depth=2, layers=[1.0, share], scores="none")
    tokens = candidates(stage, LENGTHS)
    for row, n in enumerate(LENGTHS):
        keep = max(1, round(share * n)) if share else 0
        assert groups(stage, tokens)[row] == [[i] for i in straight_stages.evenly(n, keep)]


@pytest.mark.parametrize(("offset", "stride"), [(0, 2), (1, 2), (3, 5), (30, 4), (0, 1), (2, 100)])
def test_strides_start_at_the_offset(offset, stride):
    [stage] = stages("adsc_style", layers=[4], offset=offset, stride=stride)
    tokens = candidates(stage, LENGTHS)
    for row, n in enumerate(LENGTHS):
        want = straight_stages.strided(n, offset, stride)
        assert stage.counts(n, n)[0] == len(want)
        assert groups(stage, tokens)[row] == [[i] for i in want]


@pytest.mark.parametrize("keep", [1, 4, 8, 16, 30])
@pytest.mark.parametrize("seed", range(3))
def test_sparsevlm_recycles_by_clusters(keep, seed):
    [stage] = stages("sparsevlm", layers=[3], keeps=[keep], recycle=0.7, cluster=4)
    tokens = candidates(stage, LENGTHS, seed=seed)
    for row, n in enumerate(LENGTHS):
        scores, x = tokens.scores[row, :n].tolist(), tokens.hidden()[row, :n].double()
        want = straight_stages.sparsevlm(scores, x, keep, 0.7, 4, 5)
        assert [sorted(m) for m in groups(stage, tokens)[row]] == [sorted(m) for m in want]
        assert stage.counts(n, n)[0] == len(want)


@pytest.mark.parametrize("keep", [1, 4, 16])
def test_copies_are_recycled_in_the_order_of_their_indices(keep):
    """Few different vectors, at exact distances: even centres may be copies of each other."""
    [stage] = stages("sparsevlm", layers=[3], keeps=[keep], recycle=0.9, cluster=2)
    for seed in range(4):
        tokens = candidates(stage, LENGTHS, seed=seed, C=4)
        x = (tokens.hidden() > 0.8).float()
        tokens = replace(tokens, hidden=lambda x=x: x)
        for row, n in enumerate(LENGTHS):
            scores = tokens.scores[row, :n].tolist()
            want = straight_stages.sparsevlm(scores, x[row, :n].double(), keep, 0.9, 2, 5)
            assert [sorted(m) for m in groups(stage, tokens)[row]] == [sorted(m) for m in want]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("neighbours", [1, 3, 50])
def test_clusters_are_those_of_the_formulas(count, neighbours):
    for P in (1, 2, 7, 12, 25):
        x = torch.randn(1, P, 4, generator=torch.Generator().manual_seed(P))
        padded = torch.cat([x, torch.full((1, 3, 4), 0.1)], 1)
        valid = torch.arange(P + 3)[None] < P
        k = torch.tensor([min(count, P)])
        got = dpc_knn(padded, k, min(count, P), valid, neighbours)[0, :P].tolist()
        want = straight_stages.clusters(x[0].double(), min(count, P), neighbours)
        assert got == [next(c for c, m in enumerate(want) if i in m) for i in range(P)]


def test_far_vectors_have_clusters_too():
    """Densities of vectors as long as hidden states are: exp(-d^2) is 0 in any precision."""
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    small = dpc_knn(x / 8, torch.tensor([3]), 3, torch.ones(1, 20, dtype=torch.bool), 1)
    large = dpc_knn(x * 1e3, torch.tensor([3]), 3, torch.ones(1, 20, dtype=torch.bool), 1)
    assert torch.equal(small, large)  # the nearest is itself: all densities are 1
    near = dpc_knn(x * 1e3, torch.tensor([3]), 3, torch.ones(1, 20, dtype=torch.bool), 5)
    assert len(near.unique()) == 3 and near.unique(return_counts=True)[1].max() < 18


@pytest.mark.parametrize("mode", ["paper", "official", "uniform"])
@pytest.mark.parametrize(("keep", "retain"), [(1, 0.5), (6, 0.5), (6, 0.0), (6, 1.0), (15, 0.9)])
def test_what_merges_is_the_reduction_of_the_formulas(mode, keep, retain):
    """The picks are those of the scores, the others join distinctive anchors among them."""
    [stage] = stages("fastv", keep=keep, merge=True, retain=retain, mode=mode)
    close = 0
    for seed in range(3):
        tokens = candidates(stage, LENGTHS, seed=seed)
        for row, n in enumerate(LENGTHS):
            got = groups(stage, tokens)[row]
            if keep >= n:
                assert got == [[i] for i in range(n)]
                continue
            picks = straight_stages.highest(tokens.scores[row, :n].tolist(), int(retain * keep))
            rest, want = [i for i in range(n) if i not in picks], [[i] for i in picks]
            tally = straight_line.Tally()
            if retain < 1:
                x = tokens.hidden()[row, rest].double().numpy()
                how = {"retain": 0.0, "anchor_mode": mode, "tally": tally}
                anchored = straight_line.reduce(x, keep - len(picks), "uniform", **how)
                want += [[rest[i] for i in cluster.members] for cluster in anchored]
            if tally.closest < 1e-5:  # float32 cannot be held to it
                close += 1
                continue
            assert sorted(map(sorted, got)) == sorted(map(sorted, want))
    assert close <= 1


CUTS = {
    "fastv": {"keep": 3},
    "pyramiddrop": {},
    "sparsevlm": {"keeps": [9, 6, 3]},
    "vtw": {},
    "adsc_style": {},
    "schedule": {"layers": [1.0] * 31 + [0.2], "merge": True},
}


@pytest.mark.parametrize("method", STAGE_METHODS)
def test_a_cut_reads_nothing_back_and_brings_nothing_along(method):
    """On a device without values whatever asks for one raises."""
    meta = torch.device("meta")
    rows, first, lengths = [[0, 1], [2]], [12, 20, 9], [40, 18]
    view = View(
        torch.empty(2, 40, dtype=torch.int64, device=meta),
        torch.empty(2, 40, dtype=torch.bool, device=meta),
        torch.empty(2, 40, device=meta),
        torch.empty(2, 40, dtype=torch.int64, device=meta),
        torch.empty(2, dtype=torch.int64, device=meta),
        torch.empty(2, 40, dtype=torch.bool, device=meta),
    )
    hidden = torch.empty(2, 40, 16, device=meta)
    spared = [False, False, True]
    asked = [stages(method, **CUTS[method])] * 3
    planned = plan_stages(asked, first, spared, rows, lengths, meta)
    assert planned and all(isinstance(one, PlannedStage) for one in planned)
    with OneDevice(), NoNumbers():
        for one in planned:
            scores = torch.empty(hidden.shape[:2], device=meta)
            step = make_step(one, view, hidden, scores)
            hidden = step.shorten(hidden)
            view = view.then(step)
            assert hidden.shape == (2, one.length, 16)


@pytest.mark.parametrize(
    ("method", "given", "error", "says"),
    [
        ("fastv", {"layer": 0}, ValueError, "layer must be an int >= 1, got 0"),
        ("fastv", {"layer": 32}, ValueError, r"layer in 1..31 of this model, got layer 32"),
        ("fastv", {"layer": 2.0}, TypeError, "layer must be an int"),
        ("fastv", {"layers": [2]}, TypeError, "fastv has no option 'layers'"),
        ("fastv", {"keep": 0}, ValueError, "keep must be an int >= 1, got 0"),
        ("fastv", {"keep": [4]}, TypeError, r"keep must be one int for method fastv, .* got \[4\]"),
        ("fastv", {"keep_ratio": 1.5}, ValueError, "keep_ratio must be in"),
        ("fastv", {"keep": 4, "keep_ratio": 0.5}, ValueError, "give one of keep and keep_ratio"),
        ("fastv", {"merge": 1}, TypeError, "merge must be True or False"),
        ("vtw", {"keep": 5}, ValueError, "vtw takes no keep"),
        ("pyramiddrop", {"layers": [8, 8]}, ValueError, "layers must rise"),
        ("pyramiddrop", {"layers": []}, TypeError, "layers must be a list of layer indices"),
        ("pyramiddrop", {"layers": [0, 8]}, ValueError, "layers must rise, from 1 on"),
        ("pyramiddrop", {"ratios": [0.5]}, ValueError, "one for each of the 3 layers"),
        ("pyramiddrop", {"ratios": [0.2, 0.5, 0.1]}, ValueError, "ratios must not rise"),
        ("pyramiddrop", {"ratios": [0.5, 0.2, 0.1], "keep": 5}, ValueError, "neither keep nor"),
        ("sparsevlm", {"keeps": [5, 9, 3]}, ValueError, "keeps must not rise"),
        ("sparsevlm", {"keeps": [5]}, ValueError, "one for each of the 3 layers"),
        ("sparsevlm", {"layers": [1, 2, 3, 4]}, ValueError, "keeps must be given"),
        ("sparsevlm", {"recycle": 2}, ValueError, "recycle must be in"),
        ("adsc_style", {"stride": 0}, ValueError, "stride must be an int >= 1"),
        ("adsc_style", {"offset": -1}, ValueError, "offset must be an int >= 0"),
        ("schedule", {}, ValueError, "one entry for each of the model's 32 layers, got 0"),
        ("schedule", {"layers": [5, 6] * 16}, ValueError, "must not rise with depth, got 5 and 6"),
        ("schedule", {"layers": [1.0, 3] * 16}, TypeError, "all counts .* or all shares"),
        ("schedule", {"layers": [1.5] * 32}, ValueError, r"layers\[0\] must be in \[0, 1\]"),
        ("schedule", {"layers": [-1] * 32}, ValueError, "must be an int >= 0, got -1"),
        ("schedule", {"layers": [9] * 32, "scores": "luck"}, ValueError, "scores must be one of"),
        ("divprune", {}, ValueError, "method must be one of fastv, .*, got 'divprune'"),
    ],
)
def test_what_is_wrong_is_said(method, given, error, says):
    with pytest.raises(error, match=says):
        stages(method, **given)


def test_a_schedule_is_a_dict_or_a_file(tmp_path):
    path = tmp_path / "found.json"
    said = {"layers": [9, 5], "merge": True, "about": {"accuracy": 0.9}}
    path.write_text(json.dumps(said))
    want = {"method": "schedule", "layers": [9, 5], "merge": True}
    assert read_schedule(said) == read_schedule(path) == read_schedule(str(path)) == want
    assert read_schedule({"method": "vtw", "layer": 3}) == {"method": "vtw", "layer": 3}
    with pytest.raises(ValueError, match=r"schedule must be a JSON file, got .*nowhere"):
        read_schedule(tmp_path / "nowhere.json")
    path.write_text("{")
    with pytest.raises(ValueError, match="schedule must be a JSON file"):
        read_schedule(path)
    with pytest.raises(ValueError, match="'layers' or 'method'"):
        read_schedule({"keep": 3})
    with pytest.raises(TypeError, match="a dict or the path of a JSON file, got 3"):
        read_schedule(3)
