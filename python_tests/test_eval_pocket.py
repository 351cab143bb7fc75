"""The evaluation: the same answers however it is run, honest intervals, a table made of them."""

import json

import numpy as np
import pytest
import torch

import restore_ext
from bench import eval_pocket
from restore_ext.methods import find_card, list_methods
from restore_ext.pocket import answers, encode, held_out, load_pocket
from restore_ext.pocket.eval import (
    Batch,
    Configuration,
    accuracy,
    add,
    answer,
    configurations,
    difference,
    first_words,
    kinds,
    plan,
)
from restore_ext.pocket.scenes import ID
from restore_ext.pocket.shared import Memory, shared_work
from restore_ext.pocket.table import brief, markdown

CHOSEN = [
    Configuration("full"),
    Configuration("vispruner/64/plain", {"method": "vispruner", "keep": 64, "restore": False}),
    Configuration("vispruner/64/paper", {"method": "vispruner", "keep": 64}),
]


@pytest.fixture(scope="module")
def pocket():
    return load_pocket()


def test_the_table_covers_every_method_budget_and_way():
    names = [c.name for c in configurations()]
    assert len(set(names)) == len(names) == 1 + 3 * (7 * 4 + 3 * 3 + 1) + 2 * 2 * 5 + 3 * 4 * 3 + 3
    assert {find_card(c.options["method"]).name for c in configurations()[1:]} == set(
        list_methods()
    )
    for name in (
        "tome/128/paper",
        "downsample/64/plain",
        "visionzip/192/official",
        "random/192/official",
        "divprune/64/merge",
        "holov/64/layer0-size",
        "fastv/128/merged",
        "sparsevlm/64/dropped",
        "vtw/layer2/plain",
    ):
        assert name in names


@torch.no_grad()
def test_sharing_work_changes_no_bit(pocket):
    model, processor = pocket
    scenes = [held_out(i) for i in range(3)]
    images, texts = [s.image for s in scenes], [s.question.text for s in scenes]
    inputs, other = (
        encode(processor, images[:2], texts[:2]),
        encode(processor, images[2:], texts[2:]),
    )

    kinds = ("uniform", "vispruner", "visionzip", "tome", "token_pooling")
    asked = [c for c in configurations() if c.name.startswith(tuple(f"{m}/64/" for m in kinds))]
    inside = (
        "fastv/64/plain",
        "fastv/64/calibrated",
        "fastv/64/merged",
        "sparsevlm/64/plain",
        "vtw/layer2/plain",
    )
    asked += [c for c in configurations() if c.name in inside]

    def logits():
        given = []
        for x in (inputs, other, inputs):
            for way in asked:
                with restore_ext.attach(model, **way.options):
                    given.append(model(**x, logits_to_keep=1).logits)
        return given

    alone = logits()
    calls, products = [], []
    layer = model.model.vision_tower
    layer = getattr(layer, "vision_model", layer).encoder.layers[0].mlp
    first = model.model.language_model.layers[0].mlp
    counters = [
        layer.register_forward_hook(lambda *_: calls.append(1)),
        first.gate_proj.register_forward_hook(lambda *_: products.append(1)),
    ]
    with shared_work(model):
        shared = logits()
    for counter in counters:
        counter.remove()
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert len(calls) == 3, "the same pictures went through the first layers once"
    assert len(products) == 3 * (len(asked) - len(inside) + 1), "one way up to a cut"
    assert "forward" not in vars(model.model.multi_modal_projector)
    assert "forward" not in vars(first) and type(restore_ext.ops.calibrated_attention) is not Memory


def evaluate(pocket, questions, chosen, batch, right=None):
    right = {} if right is None else right
    for part in plan(questions, chosen, right, batch):
        add(right, part, answer(*pocket, part))
    return right


def test_an_interrupted_evaluation_goes_on_to_the_same_answers(pocket):
    whole = evaluate(pocket, 7, CHOSEN, batch=3)
    assert [len(right) for right in whole.values()] == [7] * 3
    part = evaluate(pocket, 2, CHOSEN[:2], batch=2)
    left = [(b.start, b.stop, len(b.todo)) for b in plan(7, CHOSEN, part, batch=2)]
    assert left == [(0, 2, 1), (2, 4, 3), (4, 6, 3), (6, 7, 3)]
    assert evaluate(pocket, 7, CHOSEN, batch=3, right=part) == whole
    assert not any(b.todo for b in plan(7, CHOSEN, part))


@torch.no_grad()
def test_an_answer_is_right_when_it_is_the_scenes_answer(pocket):
    model, processor = pocket
    (right,) = answer(model, processor, Batch(0, 12, CHOSEN[:1])).values()
    for index, was_right in enumerate(right):
        scene = held_out(index)
        inputs = encode(processor, [scene.image], [scene.question.text])
        assert (first_words(model, inputs) == [ID[scene.question.answer]]) == was_right
    assert kinds(2) == [held_out(0).question.kind, held_out(1).question.kind]


def test_intervals_are_those_of_paired_answers():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    better = base | (rng.random(400) < 0.3)
    gain = difference(better.tolist(), base.tolist())
    d = better.astype(float) - base
    assert gain.mean == pytest.approx(d.mean())
    assert gain.half == pytest.approx(1.96 * d.std(ddof=1) / 20)
    draws = rng.integers(0, 400, (4000, 400))
    low, high = np.quantile(d[draws].mean(1), [0.025, 0.975])  # the bootstrap says about the same
    assert gain.mean - gain.half == pytest.approx(low, abs=0.005)
    assert gain.mean + gain.half == pytest.approx(high, abs=0.005)
    assert accuracy([True, False]).mean == 0.5


def test_answers_survive_the_file():
    for right in ([], [False, False, True], [True] * 9, [False] * 70):
        assert answers.unpack(answers.pack(right), len(right)) == right
    with pytest.raises(ValueError, match="must hold 4 answers, got 3"):
        answers.unpack(answers.pack([True] * 3), 4)


def made_up(name):
    """60 answers: plain half right, every other way two thirds, all tokens all."""
    every = 2 if name.endswith("plain") else 3
    return [name == "full" or (i % every != 0) for i in range(60)]


def test_the_tables_say_what_the_answers_say():
    text = markdown({c.name: made_up(c.name) for c in configurations()})
    assert "All 576 visual tokens: **1.000** ± 0.000 on 60 held-out questions" in text
    gain = difference(made_up("paper"), made_up("plain"))
    cell = f"+0.167 ± {gain.half:.3f}"
    half, more = (
        f"{a.mean:.3f} ± {a.half:.3f}" for a in map(accuracy, map(made_up, ("plain", "paper")))
    )
    assert half.startswith("0.500 ± 0.1") and more.startswith("0.667 ± 0.1")
    assert f"| 64 | divprune | {half} | {more} | {cell} | {more} | +0.000 ± 0.000 |" in text
    assert f"| 128 | tome | {half} | {more} | {cell} | no anchors |  |" in text
    assert f"| 192 | holov | {more} | {more} | +0.000 ± 0.000 |" in text
    assert f"| merge alone | {' | '.join([f'{more} ({cell})'] * 4)} |" in text
    restored = f"{half} | {more} | {cell}"
    assert f"| fastv | 64 | 576, 576, 64, 64 | 320 | {restored} | {more} ({cell}) |  |" in text
    assert f"| sparsevlm | 64 | 576, 82, 32, 18 | 177 | {restored} |  | {more} ({cell}) |" in text
    assert f"| vtw | layer2 | 576, 576, 0, 0 | 288 | {half} |  |  |  |  |" in text
    few = brief({c.name: made_up(c.name) for c in configurations()})
    assert f"| 192 | tome | {half} | **{more}** | {cell} |" in few and "60 held-out" in few
    assert "| 576 | all tokens | 1.000 ± 0.000 |  |  |" in few and "| 128 |" not in few
    assert f"| RESTORE - plain, inside the model | {cell} |" in text
    asked = {name: made_up(name) for name in ("uniform/64/plain", "uniform/64/paper")}
    assert f"| 64 | uniform | {restored} |  |  |" in markdown(asked), "not asked is no lack"
    assert "ablation" not in markdown({"full": made_up("full")})


def test_the_command_keeps_answers_and_they_make_the_tables(tmp_path, capsys):
    results = tmp_path / "r" / "answers.json"
    ask = ["--results", str(results), "--only", "vispruner/64/p", "--batch", "2", "--workers", "1"]
    eval_pocket.main([*ask, "--questions", "2"])
    first = json.loads(results.read_text())["rows"]
    eval_pocket.main([*ask, "--questions", "4"])
    rows = json.loads(results.read_text())["rows"]
    assert {row["questions"] for row in rows.values()} == {4} and len(rows) == 3
    for name, row in first.items():
        assert answers.unpack(rows[name]["right"], 4)[:2] == answers.unpack(row["right"], 2)
    assert all(len(row["commits"]) == 1 and row["options"] for row in rows.values())
    with pytest.raises(ValueError, match="must have 2000 answers of some configuration"):
        eval_pocket.tables(results)
    facts = json.loads(results.read_text())["made"]
    full = {c.name: answers.row(c, made_up(c.name) * 40, "abc1234", None) for c in configurations()}
    answers.save(results, facts, full)
    text = eval_pocket.tables(results)
    assert "| 64 | vispruner |" in text and "torch" in text and "commit abc1234" in text
    assert "Not asked yet" not in text
    few = {name: row for name, row in full.items() if not name.startswith("holov/64/")}
    answers.save(results, facts, few)
    assert eval_pocket.tables(results).endswith("Not asked yet, or not all: holov.")


def test_answers_of_other_weights_or_options_are_not_mixed_in(tmp_path, capsys):
    results = tmp_path / "answers.json"
    full = answers.row(configurations()[0], [True] * 2, "abc1234", None)
    made = {"weights": answers.fingerprint()}
    results.write_text(json.dumps({"made": made, "rows": {"full": full}}))
    assert answers.kept(results) == {"full": full}
    other = {**full, "options": {"layer0": "size"}}  # the name has come to mean something else
    results.write_text(json.dumps({"made": made, "rows": {"full": other}}))
    assert answers.kept(results) == {}
    results.write_text(json.dumps({"made": {"weights": "other"}, "rows": {"full": full}}))
    assert answers.kept(results) == {} and "other weights" in capsys.readouterr().out


def test_a_memory_answers_only_what_it_was_asked():
    calls = []
    memory = Memory(lambda *args, **kwargs: calls.append((args, kwargs)) or len(calls), kept=2)
    x = torch.arange(4.0)
    same, other = x.clone(), x + 1
    assert [memory(x, k=1), memory(same, k=1), memory(same, k=2), memory(same, k=1)] == [1, 1, 2, 1]
    assert memory(other, k=1) == 3 and memory(x, k=2) == 4, "what was not asked for longest is gone"
    different = (x.double(), x.view(2, 2), x.tolist(), None)
    assert [memory(y, k=1) for y in different] == [5, 6, 7, 8]
    assert memory(None, k=1, more=True) == 9
