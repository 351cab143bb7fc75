"""The search for a schedule: what it finds, that it goes on, and what it refuses."""

import json
import sys
from itertools import pairwise

import pytest
import torch

pytest.importorskip("optuna")  # an extra, which make installs

import restore_ext
from restore_ext.search import (
    exact_match,
    find_schedule,
    first_token,
    flops,
    kv_bytes,
    log_likelihood,
)
from restore_ext.search.budget import FlopsBudget
from restore_ext.search.psigmoid import STARTS, constant
from restore_ext.search.trials import Trial, Trials
from restore_ext.testing.models import (
    ONE_IMAGE,
    RAGGED,
    TWO_IMAGES,
    Picture,
    Video,
    make_inputs,
    tiny_model,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava")


@pytest.fixture(scope="module")
def examples(model):
    """Prompts, and the word that the whole model says."""
    made = []
    for seed in range(3):
        inputs = make_inputs("llava", ONE_IMAGE, seed=seed)
        with torch.no_grad():
            made.append((inputs, model(**inputs).logits[0, -1].argmax().item()))
    return made


class Counting:
    """A score that counts its calls, and can be stopped in one."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = 0, stop_at
        self.__name__ = "counting"

    def __call__(self, model, inputs, label):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return log_likelihood(model, inputs, label)


# --- the whole search


@pytest.mark.parametrize("pictures", [[], [Picture(height=8, width=8)]], ids=["alone", "mixed"])
def test_a_schedule_is_found_of_videos_too(pictures):
    video = tiny_model("qwen2_vl")
    inputs = make_inputs("qwen2_vl", [(5, *pictures, 2, Video(frames=3, height=8, width=8), 4)])
    found = find_schedule(video, [(inputs, 7)], log_likelihood, budget=0.8, trials=3)
    assert found.flops <= 0.8 and found.tokens[0] > found.tokens[-1], found


def test_psigmoid_keeps_to_its_budget_and_finds_no_worse_than_constant(model, examples, tmp_path):
    found = find_schedule(model, examples, log_likelihood, budget=0.6, trials=9)
    assert found.tokens[0] == 64 and all(a >= b for a, b in pairwise(found.tokens))
    text = examples[0][0]["input_ids"].shape[1] - 64
    whole = flops(model.config, [64] * 4, text)
    assert found.flops == pytest.approx(flops(model.config, found.tokens, text) / whole)
    assert 0.55 < found.flops <= 0.6
    whole = kv_bytes(model.config, [64] * 4, text)
    assert found.kv_bytes == pytest.approx(kv_bytes(model.config, found.tokens, text) / whole)

    def score(schedule):
        with torch.no_grad(), restore_ext.attach(model, schedule=schedule) as handle:
            values = [log_likelihood(model, *example)[0] for example in examples]
            assert [layer.visual for layer in handle.last.layers] == [[n] for n in found.tokens]
        return sum(values) / len(values)

    found.save(tmp_path / "found.json")
    assert score(tmp_path / "found.json") == pytest.approx(found.accuracy, abs=1e-6)
    about = json.loads((tmp_path / "found.json").read_text())["about"]
    assert about["budget"] == 0.6 and about["seed"] == 0 and about["rows"] == 3
    assert about["share of flops"] == round(found.flops, 4)
    fits = FlopsBudget(
        0.6, lambda c: flops(model.config, c, text) / flops(model.config, [64] * 4, text)
    ).fits
    level = constant(4, 1, 64, fits)
    found.tokens[:] = level
    assert found.accuracy >= score({"layers": [c / 64 for c in level]}) - 1e-6
    again = find_schedule(model, examples, log_likelihood, budget=0.6, trials=9)
    assert again.schedule == found.schedule, "the same seed finds the same"


def test_gsearch_loses_nothing_on_a_ragged_batch_of_several_images():
    model = tiny_model("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", RAGGED)
    with torch.no_grad():
        words = model(**inputs).logits[:, -1].argmax(-1).tolist()
    found = find_schedule(
        model, [(inputs, words)], algorithm="gsearch", scores="none", options={"restore": False}
    )
    assert found.accuracy == found.accuracy_whole == 1
    assert found.tokens[0] == 24 and all(a >= b for a, b in pairwise(found.tokens))
    assert found.tokens[-1] < 24 and found.flops < 1
    assert found.schedule["about"]["rows"] == 2
    with torch.no_grad(), restore_ext.attach(model, schedule=found.schedule, restore=False):
        assert model(**inputs).logits[:, -1].argmax(-1).tolist() == words


@pytest.mark.parametrize(
    "asked",
    [{"budget": 0.5, "trials": 6}, {"algorithm": "gsearch", "tolerance": 0.5}],
    ids=["psigmoid", "gsearch"],
)
def test_a_search_that_was_stopped_goes_on_and_measures_nothing_twice(
    model, examples, tmp_path, asked
):
    whole = Counting()
    wanted = find_schedule(model, examples, whole, **asked)
    assert whole.calls == 3 * wanted.trials > 3 * 4, "no schedule was measured twice"
    stopped = Counting(stop_at=3 * 4 + 1)  # in the fifth schedule
    storage = tmp_path / "trials"
    with pytest.raises(KeyboardInterrupt):
        find_schedule(model, examples, stopped, **asked, storage=storage)
    assert restore_ext.hf.handle.handle_of(model) is None
    rest = Counting()
    found = find_schedule(model, examples, rest, **asked, storage=storage)
    assert found == wanted, "it finds what it would have found"
    assert rest.calls == whole.calls - 3 * 4
    third = Counting(stop_at=0)
    assert find_schedule(model, examples, third, **asked, storage=storage) == wanted
    others = {
        "examples": {"examples": examples[:2]},
        "scores": {"scores": "none"},
        "options": {"options": {"restore": False}},
        "score": {"score": first_token},
    }
    for name, other in others.items():
        given = {"examples": examples, "score": third, **asked, **other}
        with pytest.raises(ValueError, match=rf"storage must be of the same search.*{name}"):
            find_schedule(model, storage=storage, **given)
    with pytest.raises(ValueError, match=r"storage must be of the same search.*model"):
        find_schedule(tiny_model("llava", seed=1), examples, third, **asked, storage=storage)


def test_more_trials_go_on_from_fewer(model, examples, tmp_path):
    given = {"examples": examples[:2], "score": log_likelihood, "budget": 0.5}
    wanted = find_schedule(model, **given, trials=11)  # TPE begins with the ninth
    find_schedule(model, **given, trials=9, storage=tmp_path / "t")
    assert find_schedule(model, **given, trials=11, storage=tmp_path / "t") == wanted


def test_a_latency_budget_is_kept_by_the_clock(model, examples, monkeypatch):
    asked = []

    def clock(self, layers):  # a machine on which every token takes a millisecond, and cuts three
        asked.append(tuple(layers))
        cuts = len({*layers}) - 1
        return sum(round(64 * share) for share in layers) + 3.0 * cuts

    monkeypatch.setattr("restore_ext.search.problem.Problem.latency", clock)
    found = find_schedule(model, examples, log_likelihood, latency_ms=150.0, trials=8)
    took = sum(found.tokens) + 3 * (len({*found.tokens}) - 1)
    assert 120 < took <= 150
    assert found.schedule["about"]["latency"] == f"{took:.3f} ms"
    with pytest.raises(ValueError, match=r"latency_ms must be at least 67\.0, what is left"):
        find_schedule(model, examples, log_likelihood, latency_ms=60.0, trials=8)
    # What no prediction can know: whatever is cut twice takes a second.
    monkeypatch.setattr(
        "restore_ext.search.problem.Problem.latency",
        lambda self, layers: 1e3 if len({*layers}) > 2 else clock(self, layers),
    )
    monkeypatch.setattr("restore_ext.search.proposals.STARTS", STARTS[2:3])
    refused = r"none of 1 schedules took at most 150\.0 ms, the fastest 1e\+03 ms"
    with pytest.raises(RuntimeError, match=refused):
        find_schedule(model, examples, log_likelihood, latency_ms=150.0, trials=1)


def test_the_clock_runs(model, examples):
    from restore_ext.search.problem import Problem

    problem = Problem(model, examples, first_token, "attention", False, None)
    assert 0 < problem.latency([1.0] * 4) < 1e4 and problem.latency([1.0, 0.5, 0.5, 0.5]) > 0


# --- scores


def test_scores_are_one_number_a_row(model):
    inputs = make_inputs("llava", [(5, *TWO_IMAGES[0][1:2], 7), (9, *ONE_IMAGE[0][1:])])
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        words = logits.argmax(-1).tolist()
        assert first_token(model, inputs, words) == [1.0, 1.0]
        assert first_token(model, inputs, [words[0], words[1] + 1]) == [1.0, 0.0]
        wanted = logits.log_softmax(-1)[[0, 1], words].tolist()
        assert log_likelihood(model, inputs, words) == pytest.approx(wanted, abs=1e-5)
        with pytest.raises(ValueError, match="label must be 2 token ids, one a row, got 7"):
            first_token(model, inputs, 7)

        class Processor:
            def batch_decode(self, ids, skip_special_tokens):
                assert skip_special_tokens
                return [" ".join(f"W{i}" for i in row) + " " for row in ids.tolist()]

        match = exact_match(Processor(), max_new_tokens=2)
        new = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, -2:].tolist()
        said = [" ".join(f"w{i}" for i in row) for row in new]
        assert match(model, inputs, said) == [1.0, 1.0]
        assert match(model, inputs, [said[0] + " x", said[1]]) == [0.0, 1.0]
        assert match.__name__ == "exact_match(max_new_tokens=2)"


# --- refusals


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "psigmoid needs one of budget and latency_ms"),
        ({"budget": 0.5, "latency_ms": 3}, ValueError, "psigmoid needs one of"),
        ({"budget": 1.5}, ValueError, r"budget must be in \(0, 1\], got 1.5"),
        ({"budget": 0}, ValueError, r"budget must be in \(0, 1\], got 0"),
        ({"budget": "half"}, TypeError, "budget must be a float, got 'half'"),
        ({"budget": 0.26}, ValueError, r"budget must be at least 0\.\d+, what is left without"),
        ({"latency_ms": -1}, ValueError, "latency_ms must be a number >= 0, got -1"),
        ({"budget": 0.5, "tolerance": 0.1}, ValueError, "takes a budget or latency_ms, not a tol"),
        ({"algorithm": "gsearch", "budget": 0.5}, ValueError, "gsearch takes a tolerance, not"),
        ({"algorithm": "gsearch", "tolerance": -1}, ValueError, "tolerance must be a number >= 0"),
        ({"algorithm": "grid"}, ValueError, "algorithm must be one of psigmoid, gsearch, got"),
        ({"budget": 0.5, "trials": 0}, ValueError, "trials must be an int >= 1, got 0"),
        ({"budget": 0.5, "seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
        ({"budget": 0.5, "scores": "luck"}, ValueError, "scores must be one of attention"),
        ({"budget": 0.5, "merge": 1}, TypeError, "merge must be True or False, got 1"),
        ({"budget": 0.5, "score": "exact"}, TypeError, "score must be a function of"),
        ({"budget": 0.5, "score": lambda *_: [1, 2]}, ValueError, "score must return 1 numbers, o"),
        ({"budget": 0.5, "examples": []}, ValueError, "examples must be at least one"),
        ({"budget": 0.5, "examples": [3]}, TypeError, r"examples\[0\] must be \(inputs, label\)"),
        ({"budget": 0.5, "examples": [(3, 4)]}, TypeError, "a dict of model inputs first, got int"),
        ({"budget": 0.5, "examples": [({}, 4)]}, ValueError, "must have input_ids and pixel_va"),
        ({"budget": 0.5, "options": {"keep": 9}}, ValueError, r"to the search, got \['keep'\]"),
        ({"budget": 0.5, "options": {"min_visual_tokens": 9}}, ValueError, r"got \['min_visual"),
        ({"budget": 0.5, "options": {"layer0": "x"}}, ValueError, "layer0 must be one of"),
        ({"budget": 0.5, "storage": "no/where/t"}, ValueError, "must be a file in a folder"),
    ],
)  # fmt: skip
def test_what_is_refused(model, examples, given, error, message):
    score = Counting(stop_at=0)  # it is said before anything is measured
    with pytest.raises(error, match=message):
        find_schedule(model, **{"examples": examples, "score": score, **given})
    assert restore_ext.hf.handle.handle_of(model) is None


def test_an_attached_model_and_a_foreign_storage_are_refused(model, examples, tmp_path):
    with (
        restore_ext.attach(model, keep=9),
        pytest.raises(RuntimeError, match="model must not be attached"),
    ):
        find_schedule(model, examples, budget=0.5)
    (tmp_path / "t").write_text("no journal\n")
    with pytest.raises(ValueError, match="storage must be a journal of optuna's"):
        find_schedule(model, examples, budget=0.5, storage=tmp_path / "t")
    text = {**examples[0][0], "input_ids": torch.full((1, 5), 7)}
    text["attention_mask"] = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError):
        find_schedule(model, [(text, 3)], budget=0.5)


def test_without_optuna_it_says_what_to_install(model, examples, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("trials", "proposals"):
        monkeypatch.delitem(sys.modules, f"restore_ext.search.{name}")
    with pytest.raises(ModuleNotFoundError, match=r'optuna: pip install "optuna>=5,<6" tqdm$'):
        find_schedule(model, examples, budget=0.5)


def test_trials_are_kept_as_they_were(tmp_path):
    kept = Trials(tmp_path / "t", {"a": 1})
    trial = Trial((9, 4), 0.1 + 0.2, {}, {"flops": 1 / 3})
    kept.add(trial)
    assert kept.once("x", lambda: [1, 2]) == [1, 2]
    again = Trials(tmp_path / "t", {"a": 1})
    assert again.all == [trial] and again.find((9, 4)) == trial and again.find((9, 5)) is None
    assert again.once("x", lambda: None) == [1, 2]
