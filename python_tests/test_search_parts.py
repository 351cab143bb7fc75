"""What a search is made of: its algorithms, and the formulas of what a schedule costs."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("optuna")  # an extra, which make installs

import restore_ext
from restore_ext.search import Shape, flops, kv_bytes
from restore_ext.search.budget import LatencyBudget, knot_counts
from restore_ext.search.find import most_steps
from restore_ext.search.gsearch import gsearch
from restore_ext.search.psigmoid import STARTS, constant, psigmoid
from restore_ext.search.trials import Trial
from restore_ext.testing.models import ONE_IMAGE, make_inputs, tiny_model

LAYERS = 4


# --- the algorithms


@pytest.mark.parametrize(
    "needs",
    [
        (20, 20, 13, 13, 0),
        (20, 19, 7, 1, 0),
        (20, 0, 0, 0, 0),
        (20, 20, 20, 20, 20),
        (20, 20, 20, 5, 5),
    ],
)
@pytest.mark.parametrize("first", [1, 3])
def test_gsearch_finds_the_fewest_tokens_that_do(needs, first):
    asked = []

    def does(counts):
        asked.append(counts)
        return all(count >= need for count, need in zip(counts, needs, strict=True))

    wanted = (20,) * first + needs[first:]
    assert gsearch(5, first, 20, does) == wanted
    assert len(set(asked)) <= most_steps(5, first, 20)
    for counts in asked:
        assert counts[:first] == (20,) * first
        assert all(one >= other for one, other in pairwise(counts)), "counts never grow with depth"


def test_gsearch_is_right_to_the_token():
    for need in range(21):
        for then in range(need + 1):
            found = gsearch(3, 1, 20, lambda counts: counts[1] >= need and counts[2] >= then)  # noqa: B023
            assert found == (20, need, then)


def test_gsearch_returns_only_what_was_seen_to_do():
    seen = {}

    def does(counts):  # as noise would have it: not monotone
        seen[counts] = sum(counts) % 3 != 0
        return seen[counts]

    found = gsearch(4, 1, 30, does)
    assert seen[found]


def fits_of(budget, depth):
    """Squares, so that where tokens are matters."""
    return lambda counts: sum(c * c for c in counts) <= budget * depth * 50**2


@pytest.mark.parametrize("budget", [0.26, 0.4, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("depth", [4, 7])
def test_every_curve_falls_and_is_on_the_budget(budget, depth):
    fits = fits_of(budget, depth)
    n, generator = 50, torch.Generator().manual_seed(0)
    drawn = [dict(zip(STARTS[0], torch.rand(3, generator=generator).tolist(), strict=True))
             for _ in range(20)]  # fmt: skip
    drawn = [{**point, "steepness": 200 ** point["steepness"]} for point in drawn]
    made = [psigmoid(depth, 1, n, point, fits) for point in (*STARTS, *drawn)]
    for counts in made:
        assert counts[0] == n and len(counts) == depth
        assert all(one >= other >= 0 for one, other in pairwise(counts))
        assert fits(counts)
        # No token more in every layer would fit: nothing of the budget is given away.
        assert budget == 1 or not fits((n, *(min(n, c + 1) for c in counts[1:])))
    assert made[0] == constant(depth, 1, n, fits), "the search starts from the constant schedule"
    assert len(set(made)) > 5 or budget > 0.9


def test_a_curve_without_room_is_refused():
    assert constant(4, 1, 50, fits_of(0.1, 4)) is None
    with pytest.raises(ValueError, match="budget must leave room for the prompt"):
        psigmoid(4, 1, 50, STARTS[0], fits_of(0.1, 4))


def test_latency_is_predicted_from_constant_schedules_and_corrected_by_trials():
    knots = [(0, 10.0), (50, 20.0), (100, 19.0)]  # noise: more tokens cannot be faster
    budget = LatencyBudget(15.0, 1, knots)
    assert budget.cost((100, 50, 0, 25)) == pytest.approx((20 + 10 + 15) / 3)
    assert budget.cost((100, 100, 100, 100)) == pytest.approx(20)
    assert budget.fits((100, 50, 0, 25)) and not budget.fits((100, 50, 25, 25))
    slow = Trial((100, 50, 0, 25), 1.0, {"low": 0.0}, {"latency_ms": 18.0})
    budget.learn([slow])
    assert not budget.fits((100, 50, 0, 25)) and budget.fits((100, 25, 0, 0))
    assert not budget.allows(slow)
    budget.learn([Trial((100, 0, 0, 0), 1.0, {"low": 0.0}, {"latency_ms": 40.0})])
    assert budget.fits((100, 0, 0, 0)) and not budget.fits((100, 9, 9, 9)), "a curve is left"
    assert knot_counts(100) == [0, 25, 50, 75, 100] and knot_counts(2) == [0, 1, 2]


# --- the formulas


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 4}, {"head_dim": 64}])
def test_flops_are_those_that_torch_counts_in_the_layers(text):
    model = tiny_model("llava", attn="eager", **text)  # the counter knows no sdpa of the CPU
    inputs = make_inputs("llava", ONE_IMAGE)
    schedule = {"layers": [1.0, 0.5, 0.5, 0.1], "scores": "none"}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), restore_ext.attach(model, schedule=schedule, backend="mask") as handle:
        with counter:
            model(**inputs, use_cache=True)
        visual = [layer.visual[0] for layer in handle.last.layers]
        kv = handle.last.kv_bytes
    assert visual == [64, 32, 32, 6]
    others = inputs["input_ids"].shape[1] - 64
    counts = counter.get_flop_counts()
    layers = [name for name in counts if name.rpartition(".")[0].endswith("language_model.layers")]
    assert len(layers) == LAYERS
    total = sum(sum(counts[name].values()) for name in layers)
    assert 2 * flops(model.config, visual, others) == total
    assert kv_bytes(model.config, visual, others, dtype=torch.float32) == kv


def test_flops_are_the_papers_where_heads_are_as_wide_as_the_model():
    config = tiny_model("llava", num_key_value_heads=4).config
    C, F, N = 128, 96, 70
    assert flops(config, [64] * 4, 6) == 4 * (4 * N * C * C + 2 * N * N * C + 3 * N * C * F)
    assert kv_bytes(config, [64] * 4, 6) == 2 * 4 * N * C * 2


@pytest.mark.parametrize(
    ("visual", "text", "error", "message"),
    [
        ([64] * 3, 0, ValueError, "visual must be 4 ints, one a layer of the model, got"),
        ("6464", 0, ValueError, "visual must be 4 ints"),
        ([64, 64, -1, 0], 0, ValueError, r"visual\[2\] must be an int >= 0, got -1"),
        ([64, 64, 0.5, 0], 0, TypeError, r"visual\[2\] must be an int, got 0.5"),
        ([64] * 4, -3, ValueError, "text must be an int >= 0, got -3"),
    ],
)
def test_costs_refuse_what_is_no_schedule(visual, text, error, message):
    config = tiny_model("llava").config
    for cost in (flops, kv_bytes):
        with pytest.raises(error, match=message):
            cost(config, visual, text)


def test_a_row_keeps_its_share_of_each_image():
    assert Shape((24, 15), 9).visual([1.0, 0.5, 0.01, 0.0]) == [39, 12 + 8, 2, 0]
