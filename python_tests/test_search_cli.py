"""restore-ext search, the file it writes, and --schedule, which takes it."""

import json
import sys

import pytest
import torch

pytest.importorskip("optuna")  # an extra, which make installs

import restore_ext
from bench import search_pocket
from restore_ext.cli import main
from restore_ext.pocket import held_out, load_pocket
from restore_ext.pocket.eval import Configuration, first_words
from restore_ext.pocket.scenes import HELD_OUT
from restore_ext.pocket.shared import remembered_features
from restore_ext.search import examples, find_schedule, flops

FEW = ["search", "--model", "pocket", "--questions", "3"]


@pytest.fixture
def questions(tmp_path):
    """A file of questions, with their pictures beside it."""
    lines = []
    for i in range(2):
        scene = held_out(examples.FIRST + i)
        scene.image.save(tmp_path / f"{i}.png")
        line = {"image": f"{i}.png", "prompt": scene.question.text, "answer": scene.question.answer}
        lines.append(json.dumps(line))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path / "questions.jsonl"


def test_a_search_writes_a_schedule_that_run_and_demo_take(tmp_path, capsys):
    file = tmp_path / "found.json"
    given = [*FEW, "--trials", "2", "--budget", "0.4", "--scores", "none", "--output", str(file)]
    assert main(given) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["scores"] == "none" and found["about"]["budget"] == 0.4
    tokens = found["about"]["tokens"]
    assert f"tokens    {' '.join(map(str, tokens))}\n" in out and "on 3 questions" in out
    model, processor = load_pocket()
    assert flops(model.config, tokens, 14) <= 0.402 * flops(model.config, [576] * 4, 14)
    [(inputs, answers)] = examples.pocket_examples(processor, 3)
    with restore_ext.attach(model, schedule=file) as handle:
        words = first_words(model, inputs)
        assert [layer.visual for layer in handle.last.layers] == [[n] * 3 for n in tokens]
    right = sum(w == a for w, a in zip(words, answers, strict=True)) / 3
    assert found["about"]["accuracy"] == round(right, 4)
    assert main(given) == 2
    assert "found.json.trials is there already: --resume goes on" in capsys.readouterr().err
    assert main([*given, "--resume"]) == 0
    assert json.loads(file.read_text()) == found and capsys.readouterr().out == out

    held_out(2).image.save(tmp_path / "scene.png")
    run = ["run", "--model", "pocket", "--image", str(tmp_path / "scene.png"), "--prompt"]
    assert main([*run, "where is the ring ?", "--schedule", str(file)]) == 0
    out = capsys.readouterr().out
    assert "schedule + RESTORE  " in out and f"576 to {tokens[-1]} " in out
    demo = ["demo", "--seed", "2", "--repeats", "1", "--output", str(tmp_path / "d.png")]
    assert main([*demo, "--schedule", str(file), "--method", "divprune", "--keep", "200"]) == 0
    out = capsys.readouterr().out
    left = round(200 * found["layers"][-1])
    assert "divprune, schedule plain" in out and f"200 to {left} " in out


def test_a_search_on_a_file_of_questions_by_gsearch(tmp_path, questions, capsys):
    file = tmp_path / "found.json"
    given = ["search", "--model", "pocket", "--data", str(questions), "--algorithm", "gsearch"]
    more = ["--tolerance", "1", "--no-restore", "--max-new-tokens", "1", "--output", str(file)]
    assert main([*given, *more]) == 0
    found = json.loads(file.read_text())
    assert found["about"]["tokens"] == [576, 0, 0, 0], "all may be lost, so nothing is kept"
    assert found["about"]["score"] == "exact_match(max_new_tokens=1)"
    assert found["about"]["options"] == {"restore": False, "backend": "op"}
    assert "with all tokens 1.000, on 2 questions" in capsys.readouterr().out


def test_a_search_by_the_clock_times_one_prompt_at_a_time(tmp_path, monkeypatch):
    asked = []

    def listen(model, given, *rest, **more):
        asked.extend(len(inputs["input_ids"]) for inputs, _ in given)
        return find_schedule(model, given, *rest, **more)

    monkeypatch.setattr("restore_ext.cli.search.find_schedule", listen)
    file = tmp_path / "found.json"
    given = ["search", "--model", "pocket", "--questions", "2", "--trials", "1"]
    assert main([*given, "--latency-ms", "1e6", "--output", str(file)]) == 0
    about = json.loads(file.read_text())["about"]
    assert about["tokens"] == [576] * 4, "all that there is room for"
    assert 0 < float(about["latency"].removesuffix(" ms")) < 1e4
    assert asked == [1, 1]


def test_pocket_is_asked_what_no_evaluation_asks():
    _, processor = load_pocket()
    [(one, first), (other, last)] = examples.pocket_examples(processor, 3, batch=2)
    assert [len(first), len(last)] == [2, 1] and len(other["pixel_values"]) == 1
    from restore_ext.pocket import encode
    from restore_ext.pocket.scenes import ID

    for place, (inputs, row, answer) in enumerate([(one, 0, first[0]), (one, 1, first[1]),
                                                   (other, 0, last[0])]):  # fmt: skip
        scene = held_out(examples.FIRST + place)
        alone = encode(processor, [scene.image], [scene.question.text])
        assert inputs["pixel_values"][row].equal(alone["pixel_values"][0])
        assert answer == ID[scene.question.answer]
    assert 100_000 < examples.FIRST < HELD_OUT, "evaluations count from 0"


def test_the_tower_sees_a_batch_once_and_changes_no_bit():
    model, processor = load_pocket()
    tower, seen = model.model.vision_tower, []
    inside = next(m for name, m in tower.named_modules() if name.endswith("embeddings"))
    given = [inputs for inputs, _ in examples.pocket_examples(processor, 2, batch=1)]
    schedule = {"layers": [1.0, 0.5, 0.2, 0.0]}
    with torch.no_grad(), restore_ext.attach(model, schedule=schedule):
        wanted = [model(**inputs).logits for inputs in given]
    hook = inside.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), remembered_features(model, len(given)):
        for _ in range(2):
            with restore_ext.attach(model, schedule=schedule):
                for inputs, logits in zip(given, wanted, strict=True):
                    assert model(**inputs).logits.equal(logits)
    hook.remove()
    assert len(seen) == 2 and "forward" not in vars(tower)


def wrong(tmp_path, questions):
    """Name of the mistake: (arguments, what the one line says)."""
    bad, empty = tmp_path / "bad.jsonl", tmp_path / "empty.jsonl"
    bad.write_text('{"image": "0.png", "prompt": "where ?"}\n')
    empty.write_text("\n")
    (tmp_path / "word.jsonl").write_text("{'image'}\n")
    gone = tmp_path / "gone.jsonl"
    gone.write_text('{"image": "gone.png", "prompt": "how many objects ?", "answer": "two"}\n')
    (tmp_path / "other.json").write_text('{"layers": [1.0, 0.5]}')
    data = ["search", "--model", "pocket", "--output", str(tmp_path / "x.json"), "--data"]
    demo = ["demo", "--repeats", "1", "--output", str(tmp_path / "x.png"), "--schedule"]
    other = str(tmp_path / "other.json")
    return {
        "no data": (["search", "--model", "a/b"], "--data must name a file with questions for"),
        "no file": ([*data, "nowhere"], "--data: nowhere cannot be read"),
        "no questions": ([*data, str(empty)], f"--data: {empty} has no questions"),
        "no answer": ([*data, str(bad)], "line 1 must have texts image, prompt, answer, got"),
        "no json": ([*data, str(tmp_path / "word.jsonl")], "line 1 is not JSON"),
        "no picture": ([*data, str(gone)], f"line 1: there is no file {tmp_path / 'gone.png'}"),
        "trials": ([*FEW, "--trials", "0"], "--trials must be at least 1, got 0"),
        "budget": ([*FEW, "--budget", "2"], "budget must be in (0, 1], got 2.0"),
        "both": ([*FEW, "--budget", ".5", "--latency-ms", "9"], "psigmoid needs one of budget"),
        "gsearch": ([*FEW, "--algorithm", "gsearch", "--budget", ".5"], "gsearch takes a toler"),
        "output": ([*FEW, "--output", "no/where.json"], "--output must be a file in a folder"),
        "little": (
            [*FEW[:-1], "1", "--budget", ".1", "--output", str(tmp_path / "y.json")],
            "budget must be at least 0.2",
        ),
        "schedule": ([*demo, "nowhere.json"], "--schedule: schedule must be a JSON file, got"),
        "twice": ([*demo, other, "--method", "fastv"], "--schedule must not be given with --me"),
        "no keep": ([*demo, other, "--method", "tome"], "--method tome before a --schedule needs"),
        "layers": ([*demo, other], "layers must have one entry for each of the model's 4 layers"),
    }


NAMES = [
    "no data", "no file", "no questions", "no answer", "no json", "no picture", "trials", "budget",
    "both", "gsearch", "output", "little", "schedule", "twice", "no keep", "layers",
]  # fmt: skip


@pytest.mark.parametrize("mistake", NAMES)
def test_a_mistake_is_said_in_one_line(mistake, tmp_path, questions, capsys):
    cases = wrong(tmp_path, questions)
    assert list(cases) == NAMES
    arguments, message = cases[mistake]
    assert main(arguments) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(told) == 1 and message in told[0]


def test_without_optuna_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(FEW) == 2
    install = 'pip install "optuna>=5,<6" tqdm'
    assert capsys.readouterr().err == f"restore-ext: error: search needs optuna: {install}\n"


def test_a_search_that_is_interrupted_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("restore_ext.cli.search.find_schedule", stop)
    assert main([*FEW, "--output", str(tmp_path / "x.json")]) == 2
    assert "stopped: the same command with --resume goes on" in capsys.readouterr().err


# --- the bench


def test_rivals_take_as_many_flops_as_what_they_are_compared_with():
    config = load_pocket()[0].config
    for layers, scores in (([1.0, 0.7, 0.3, 0.1], "attention"), ([1.0, 0.5, 0.5, 0.0], "none")):
        budget = flops(config, [round(576 * share) for share in layers], search_pocket.TEXT)
        rivals = search_pocket.against(config, layers, scores)
        tokens = [search_pocket.counts_of(rival.options) for rival in rivals]
        takes = [flops(config, counts, search_pocket.TEXT) for counts in tokens]
        for below, above in zip(tokens[:-1:2], tokens[1:-1:2], strict=True):
            assert [above[i] - below[i] for i in range(4)] == [0, 1, 1, 1] and above[0] == 576
        assert all(cost < budget for cost in takes[:-1:2])
        assert all(cost >= budget for cost in [*takes[1:-1:2], takes[-1]])
        assert flops(config, [tokens[-1][0] - 1] * 4, search_pocket.TEXT) < budget
        kinds = [rival.options.get("schedule", {}).get("scores") for rival in rivals]
        both = ["attention", "attention"] if scores == "attention" else []
        assert kinds == [*both, "none", "none", None] and rivals[-1].options["method"] == "uniform"


def test_the_table_is_made_of_the_answers_kept(tmp_path, monkeypatch):
    config = load_pocket()[0].config
    found = Configuration("found", {"schedule": {"layers": [1.0, 0.5, 0.25, 0.0]}})
    rival = Configuration("rival", {"method": "uniform", "keep": 288})
    right = {"full": [True] * 8, "found": [True] * 6 + [False] * 2, "rival": [True, False] * 4}
    named = [Configuration("full"), found, rival]
    rows = [search_pocket.row(config, c, right[c.name]) for c in named]
    made = {
        "command": "c", "search questions": 9, "machine": "m", "torch": "t", "transformers": "v",
        "commit": "k", "weights": "w",
    }  # fmt: skip
    content = {"made": made, "rivals": {"found": ["rival"]}, "rows": rows}
    results = tmp_path / "r.json"
    search_pocket.save(results, content)
    with pytest.raises(ValueError, match="must have 1000 answers everywhere, lacks"):
        search_pocket.tables(results)
    monkeypatch.setattr(search_pocket, "ENOUGH", 8)
    text = search_pocket.tables(results)
    share = flops(config, [576, 288, 144, 0], 14) / flops(config, [576] * 4, 14)
    assert f"| **found** | 576, 288, 144, 0 | {share:.3f} | 0.750 ± 0.321 |  |" in text
    assert "| rival | 288, 288, 288, 288 |" in text and "| +0.250 ± 0.490 |" in text
    facts = {"weights": "w"}
    assert search_pocket.kept(results, facts, named) == right
    assert search_pocket.kept(results, {"weights": "x"}, named) == {}
    changed = [Configuration("found", {}), rival]
    assert search_pocket.kept(results, facts, changed) == {"rival": right["rival"]}
