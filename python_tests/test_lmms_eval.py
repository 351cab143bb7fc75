"""The plug-in under the real lmms-eval, on the pocket model's own questions: make test-eval.

lmms-eval is to give the answers that restore_ext's own evaluation of the pocket model gives.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import restore_ext
from bench import pocket_task
from restore_ext.pocket import WORDS, encode, held_out, load_pocket
from restore_ext.pocket.eval import (
    PLAIN,
    RESTORE,
    Batch,
    Configuration,
    accuracy,
    answer,
    first_words,
)

if find_spec("lmms_eval") is None:
    pytest.skip("needs lmms_eval: make test-eval", allow_module_level=True)

ROOT = Path(__file__).parent.parent
QUESTIONS = 16
TASK, CHOICE = pocket_task.TASK, f"{pocket_task.TASK}_choice"
WAYS = {
    "all tokens": {},
    "plain": {"method": "divprune", "keep": 64, **PLAIN},
    "RESTORE": {"method": "divprune", "keep": 64, **RESTORE},
    "in the tower": {"method": "tome_vit", "keep": 192},
    "in the language model": {"method": "fastv", "keep": 64, "restore": False},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of the tasks, with the checkpoint beside them as a user has one."""
    folder = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    pocket_task.write(folder, QUESTIONS)
    model, processor = load_pocket()
    for part in (model, processor):
        part.save_pretrained(folder / "checkpoint")
    return folder


def evaluate(tasks, given, batch_size=8, task=TASK, **options):
    """(results of lmms-eval, its samples in order)."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    arguments = {"pretrained": tasks / "checkpoint", "device": "cpu", **given}
    results = simple_evaluate(
        model="restore_ext",
        model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
        tasks=[task],
        task_manager=TaskManager("ERROR", str(tasks), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
        **options,
    )
    return results, sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def said(samples):
    return [sample["filtered_resps"][0] for sample in samples]


@pytest.fixture(scope="module")
def pocket():
    """restore_ext's own evaluation: the words said in each way, and whether they are right."""
    model, processor = load_pocket()
    scenes = [held_out(i) for i in range(QUESTIONS)]
    inputs = encode(processor, [s.image for s in scenes], [s.question.text for s in scenes])
    words = {}
    for way, options in WAYS.items():
        with torch.no_grad():
            if options:
                with restore_ext.attach(model, **options):
                    ids = first_words(model, inputs)
            else:
                ids = first_words(model, inputs)
        words[way] = [WORDS[i] for i in ids]
    asked = [Configuration(way, options) for way, options in WAYS.items()]
    return words, answer(model, processor, Batch(0, QUESTIONS, asked))


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_the_own_evaluation(tasks, pocket, way):
    words, right = pocket
    results, samples = evaluate(tasks, WAYS[way] or {"method": "none"})
    assert said(samples) == words[way]
    assert [bool(sample["exact_match"]) for sample in samples] == right[way]
    score = results["results"][TASK]["exact_match,none"]
    assert score == pytest.approx(accuracy(right[way]).mean)


def test_the_ways_differ(pocket):
    words, _ = pocket
    assert len({tuple(answers) for answers in words.values()}) == len(WAYS)


def test_nothing_reduced_is_the_unhooked_model(tasks, pocket):
    results, samples = evaluate(tasks, {"method": "divprune", "keep": 576})
    assert said(samples) == pocket[0]["all tokens"]
    assert results["throughput"]["avg_visual_tokens_first_layer"] == 576


@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_do_not_depend_on_the_batch(tasks, pocket, batch_size):
    _, samples = evaluate(tasks, WAYS["RESTORE"], batch_size)
    assert said(samples) == pocket[0]["RESTORE"]


def test_results_say_how_many_tokens_there_were(tasks):
    results, samples = evaluate(tasks, WAYS["in the language model"])
    seen = results["throughput"]
    assert seen["avg_visual_tokens"] == seen["avg_visual_tokens_first_layer"] == 576
    assert seen["avg_visual_tokens_last_layer"] == 64
    _, fewer = evaluate(tasks, WAYS["plain"])
    for whole, reduced in zip(samples, fewer, strict=True):
        (a,), (b,) = whole["token_counts"], reduced["token_counts"]
        assert a["input_tokens"] - b["input_tokens"] == 576 - 64 and a["output_tokens"] == 1


def test_simple_tasks_and_tasks_by_likelihood(tasks, pocket):
    _, samples = evaluate(tasks, WAYS["RESTORE"], force_simple=True)
    assert said(samples) == pocket[0]["RESTORE"]
    _, samples = evaluate(tasks, WAYS["RESTORE"], task=CHOICE, force_simple=True)
    model, processor = load_pocket()
    scenes = [held_out(i) for i in range(QUESTIONS)]
    inputs = encode(processor, [s.image for s in scenes], [s.question.text for s in scenes])
    choices = samples[0]["doc"]["choices"]
    with torch.no_grad(), restore_ext.attach(model, **WAYS["RESTORE"]):
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    best = logits[:, [WORDS.index(c) for c in choices]].argmax(-1).tolist()
    right = [choices[i] == s.question.answer for i, s in zip(best, scenes, strict=True)]
    assert [bool(sample["acc"]) for sample in samples] == right and any(right)


@pytest.mark.parametrize("visual", ["clip.mp4", {"array": [0.0], "sampling_rate": 1}])
def test_what_is_no_picture_is_refused(visual):
    from restore_ext.integrations.lmms_eval.model import _simple

    with pytest.raises(NotImplementedError, match=f"PIL images, got {type(visual).__name__}"):
        _simple("what is it ?", [visual])


def test_a_task_of_several_rounds_is_asked_round_by_round(tasks):
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    scenes = [held_out(i) for i in range(2)]

    def message(scene):
        text = {"type": "text", "text": scene.question.text.replace("?", " ?")}
        return [{"role": "user", "content": [{"type": "image", "url": scene.image}, text]}]

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return message(scenes[0])
        assert (
            len(previous_output) == round_idx and previous_round_info == [None, "on"][round_idx - 1]
        )
        return (None if round_idx == 2 else message(scenes[1])), round_idx == 2, None, "on"

    lm = get_model("restore_ext")(pretrained="pocket", device="cpu", **WAYS["plain"])
    lm.task_dict = {"t": {"test": [{}]}}
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    given = {"max_new_tokens": 1, "until": ["\n\n"]}

    def ask(kind, messages_of):
        arguments = ("", messages_of, given, 0, "t", "test")
        return [Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)]

    (told,) = lm.generate_until_multi_round(ask("generate_until_multi_round", rounds))
    for scene, text in zip(scenes, told, strict=True):
        (alone,) = lm.generate_until(ask("generate_until", lambda doc, s=scene: message(s)))
        assert alone.text == text
    once = ask("generate_until_multi_round", lambda doc, **_: message(scenes[0]))
    assert lm.generate_until_multi_round(once) == [told[:1]]
    with pytest.raises(NotImplementedError, match="need --force_simple"):
        lm.loglikelihood(once)
    lm.clean()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "best"}, "method must be one of"),
        ({"keeep": 1}, "there is no argument keeep"),
        ({"pretrained": "/nowhere"}, "pretrained: /nowhere is not a folder"),
        (
            {"method": "tome_vit", "keep": 700, "budget": "shared"},
            "keep must be one int and budget",
        ),
    ],
)
def test_a_wrong_argument_is_named(tasks, given, said):
    with pytest.raises(Exception, match=said):
        evaluate(tasks, given)


def test_batches_must_have_a_size(tasks):
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got auto"):
        evaluate(tasks, {}, batch_size="auto")


def test_the_command_writes_results(tasks, pocket):
    command = [sys.executable, "-m", "lmms_eval", "--model", "restore_ext", "--tasks", TASK]
    command += ["--include_path", str(tasks), "--output_path", str(tasks / "out")]
    command += ["--log_samples", "--batch_size", "8", "--model_args"]
    command += ["pretrained=pocket,device=cpu,method=divprune,keep=64,layer0=uniform"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tasks / "out").glob(f"*/*samples_{TASK}.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["filtered_resps"] for row in rows] == pocket[0]["RESTORE"]
    assert "visual tokens a prompt: 576, in the first layer 64" in done.stdout + done.stderr
