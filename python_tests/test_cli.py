"""restore-ext on the command line: what it prints and writes, and what it says when it cannot."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import restore_ext
from restore_ext.cli import main
from restore_ext.cli.load import encode_prompt
from restore_ext.cli.measure import Task
from restore_ext.methods import list_methods
from restore_ext.pocket import POCKET_NAME, held_out, load_pocket
from restore_ext.pocket.eval import configurations
from restore_ext.pocket.model import FOLDER

QUICK = ["--repeats", "1"]
LAYERS, WIDTH = 4, 192


@pytest.fixture
def scene(tmp_path):
    """A drawn scene as a file, with its question."""
    scene = held_out(2)
    scene.image.save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png"), scene.question.text


def columns(out):
    """The table's rows by their label: [answer, visual tokens, prefill, decode, KV bytes]."""
    lines = out.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    titles = ["answer", "visual tokens", "prefill ms", "decode ms/token", "KV bytes"]
    assert re.split(r"  +", lines[rule - 1].strip()) == titles
    rows = {}
    for line in lines[rule + 1 :]:
        if not line:
            break
        label, *cells = re.split(r"  +", line)
        rows[label] = cells
    return rows


def test_demo_prints_one_table_and_draws_the_picture(tmp_path, capsys):
    png = tmp_path / "demo.png"
    assert main(["demo", "--seed", "2", "--keep", "64", "--output", str(png), *QUICK]) == 0
    out = capsys.readouterr().out
    question = held_out(2).question
    assert f"question  {question.text}\ntruth     {question.answer}\n" in out
    rows = columns(out)
    assert list(rows) == ["all tokens", "vispruner plain", "vispruner + RESTORE"]
    words = len(question.text.split()) + 9 + 2  # with the system's and the roles'
    for (answer, tokens, prefill, decode, kv), visual in zip(
        rows.values(), (576, 64, 64), strict=True
    ):
        assert len(answer.split()) == 1 and int(tokens) == visual
        assert float(prefill) > 0 and float(decode) > 0
        assert int(kv.replace(",", "")) == (visual + words) * LAYERS * WIDTH * 2 * 4
    with Image.open(png) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] > 3 * 480
    panels = [pixels[76:556, 24 + 504 * i : 504 + 504 * i] for i in range(3)]
    for panel in panels:
        assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 50
    assert (panels[0] != panels[1]).mean() > 0.3 and (panels[1] != panels[2]).mean() > 0.3


def test_demo_takes_a_picture_and_a_question(tmp_path, scene, capsys):
    file, question = scene
    given = ["demo", "--image", file, "--question", question, "--output", str(tmp_path / "a.png")]
    assert main([*given, "--method", "divprune", "--keep", "600", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "truth" not in out
    rows = columns(out)
    assert [row[1] for row in rows.values()] == ["576"] * 3, "600 tokens leave nothing to reduce"
    assert len({row[0] for row in rows.values()}) == 1


def test_run_answers_as_the_demo_does(tmp_path, scene, capsys):
    file, question = scene
    main(["demo", "--seed", "2", "--output", str(tmp_path / "a.png"), *QUICK])
    wanted = columns(capsys.readouterr().out)
    shutil.copytree(FOLDER, tmp_path / "copy")
    for model in ("pocket", str(tmp_path / "copy")):
        given = ["run", "--model", model, "--image", file, "--prompt", question, "--keep", "64"]
        assert main([*given, "--compare"]) == 0
        out = capsys.readouterr().out
        got = columns(out)
        assert list(got) == list(wanted)
        for label, (answer, tokens, _, _, kv) in got.items():
            assert [answer, tokens, kv] == [wanted[label][i] for i in (0, 1, 4)]
        assert out.splitlines()[0] == wanted["vispruner + RESTORE"][0]
    assert main([*given, "--no-restore", "--backend", "mask"]) == 0
    assert list(columns(capsys.readouterr().out)) == ["vispruner plain"]


def test_demo_and_run_cut_inside_the_language_model(tmp_path, scene, capsys):
    png = str(tmp_path / "a.png")
    for method, keep, left in (("fastv", 9, 9), ("pyramiddrop", None, 64), ("vtw", None, 0)):
        given = ["demo", "--seed", "2", "--method", method, "--output", png, *QUICK]
        assert main([*given, *(["--keep", str(keep)] if keep else [])]) == 0
        rows = columns(capsys.readouterr().out)
        both = [f"{method} plain", f"{method} + RESTORE"][: 1 + (method != "vtw")]
        assert list(rows) == ["all tokens", *both]
        assert all(rows[label][1] == f"576 to {left}" for label in both)
        stock = int(rows["all tokens"][4].replace(",", ""))
        assert all(int(rows[label][4].replace(",", "")) < stock for label in both)
        with Image.open(png) as picture:
            pixels = np.asarray(picture)
        first, second = (pixels[76:556, 24 + 504 * i : 504 + 504 * i] for i in range(2))
        assert (first != second).mean() > 0.3, "the picture shows what is left"
    file, question = scene
    given = ["run", "--model", "pocket", "--image", file, "--prompt", question]
    assert main([*given, "--method", "fastv"]) == 0
    assert columns(capsys.readouterr().out)["fastv + RESTORE"][1] == "576 to 64"


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("fastv", {"keep": 20}),
        ("vtw", {}),
        ("sparsevlm", {"keep": 64}),
        ("pyramiddrop", {"keep": 20, "options": {"merge": True}}),
        ("tome", {"keep": 90, "schedule": {"method": "pyramiddrop", "keep": 9, "merge": True}}),
    ],
)
def test_what_is_shown_of_the_first_picture_is_what_the_last_layer_has(method, given):
    model, processor = load_pocket()
    scene = held_out(2)
    inputs = encode_prompt(POCKET_NAME, processor, scene.image, scene.question.text, model)
    with restore_ext.attach(model, method=method, **given) as handle:
        outcome = Task(model, processor, inputs, 1, 1).answer(method, handle)
        last, image = handle.last.stages[-1].plan, handle.last.images[0]
    shown = outcome.reduction
    left = outcome.tokens.last_layer
    sizes = last.size[last.is_visual]
    assert shown.size.shape == (1, left) and len(sizes) == left
    assert shown.size[0].sort().values.equal(sizes.sort().values)
    members = shown.group[shown.group >= 0].bincount(minlength=left)
    assert members.tolist() == shown.size[0].tolist()
    assert (members[shown.kept[0]] == 1).all()
    if method == "fastv":  # what stays is known by its place in the prompt
        assert shown.position[0].equal(handle.last.source[last.is_visual] - image.start)


def test_run_can_say_more_than_a_word(scene, capsys):
    file, _ = scene
    given = ["run", "--model", "pocket", "--image", file, "--prompt", "describe"]
    assert main([*given, "--max-new-tokens", "6"]) == 0
    assert len(capsys.readouterr().out.splitlines()[0].split()) == 6


def test_config_and_module_and_eval(tmp_path, capsys, monkeypatch):
    command = [sys.executable, "-m", "restore_ext", "config"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"^torch +\d", shown.stdout, re.M) and not shown.stderr
    assert re.search(rf"^restore_ext +{re.escape(restore_ext.__version__)}$", shown.stdout, re.M)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"restore_ext {restore_ext.__version__}\n"
    file = tmp_path / "answers.json"
    ask = ["eval", "pocket", "--only", "uniform/64/p", "--output", str(file), "--questions"]
    assert main([*ask, "3"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^uniform/64/paper +[01]\.\d{3} ± ", out, re.M)
    assert "| 64 | uniform |" in out
    rows = json.loads(file.read_text())["rows"]
    assert {row["questions"] for row in rows.values()} == {3} and len(rows) == 2
    monkeypatch.setattr(
        "restore_ext.pocket.eval.answer", lambda *_: 1 / 0
    )  # nothing is asked again
    assert main([*ask, "2"]) == 0
    assert re.search(r"^uniform/64/plain +[01]\.\d{3} ± ", capsys.readouterr().out, re.M)
    for other in (
        "[]",
        '{"made": {"weights": ""}, "rows": []}',
        '{"made": {"weights": ""}, "rows": {"a": 1}}',
    ):
        file.write_text(other)
        assert main([*ask, "2"]) == 2 and "must be a file of answers" in capsys.readouterr().err
    assert main(["eval", "pocket", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert "divprune/64/paper" in names and "full" in names and 15 < len(names) < 30
    assert main(["eval", "pocket", "--list", "--all"]) == 0
    assert len(capsys.readouterr().out.split()) == len(configurations())


def wrong(tmp_path):
    """Name of the mistake: (arguments, what the one line says)."""
    picture, text = str(tmp_path / "ok.png"), str(tmp_path / "text.png")
    empty, alien = tmp_path / "empty", tmp_path / "alien"
    held_out(0).image.save(picture)
    (tmp_path / "text.png").write_text("no picture")
    empty.mkdir()
    alien.mkdir()
    (alien / "config.json").write_text(json.dumps({"model_type": "bert"}))
    shutil.copytree(FOLDER, tmp_path / "other")
    run = ["run", "--image", picture, "--prompt", "where is the ring ?", "--model"]
    demo = ["demo", "--output", str(tmp_path / "out.png")]
    names = ", ".join(list_methods())
    return {
        "no file": ([*demo, "--image", "no.png"], "--image: there is no file no.png"),
        "no image": ([*demo, "--image", text], f"--image: {text} cannot be read as an image"),
        "a folder": ([*demo, "--image", str(empty)], "cannot be read as an image"),
        "method": ([*demo, "--method", "best"], f"--method must be one of {names}, got best"),
        "schedule": ([*demo, "--method", "schedule"], "schedule needs the tokens of every layer"),
        "no budget": (
            [*demo, "--method", "vtw", "--keep", "64"],
            "--keep must not be given with --method vtw, which takes no budget",
        ),
        "keep in the tower": (
            [*demo, "--method", "tome_vit", "--keep", "3"],
            "keep must be at least 36 for method tome_vit, which halves 576 tokens",
        ),
        "keep": ([*demo, "--keep", "0"], "--keep must be at least 1, got 0"),
        "keep word": ([*demo, "--keep", "few"], "argument --keep: invalid int value: 'few'"),
        "repeats": ([*demo, "--repeats", "0"], "--repeats must be at least 1, got 0"),
        "seed": ([*demo, "--seed", "-1"], "--seed must be at least 0, got -1"),
        "word": ([*demo, "--question", "where is the dog ?"], "does not know 'dog'"),
        "output": ([*demo[:1], "--output", str(tmp_path / "x.nothing"), *QUICK], "--output: "),
        "command": (["play"], "invalid choice: 'play'"),
        "prompt word": ([*run, "pocket", "--prompt", "is it a cat ?"], "does not know 'it', 'cat'"),
        "new tokens": ([*run, "pocket", "--max-new-tokens", "0"], "--max-new-tokens must be at"),
        "device": ([*run, "pocket", "--device", "teapot"], "--device: teapot cannot be used"),
        "device of diagnose": (
            ["diagnose", "--model", "pocket", "--device", "teapot", "--output", str(tmp_path)],
            "--device: teapot cannot be used",
        ),
        "empty folder": ([*run, str(empty)], f"the folder {empty} has no config.json"),
        "no folder": ([*run, "./nowhere"], "--model: ./nowhere is not a folder with a model"),
        "alien": ([*run, str(alien)], f"--model: {alien} cannot be loaded"),
        "offline": ([*run, "someone/model"], "someone/model is not a folder and not in the cache"),
        "id": ([*run, "a/b/c"], "there is no folder and no model on the hub named a/b/c"),
        "questions": (["eval", "pocket", "--questions", "0"], "must be an int of at least 1"),
        "eval output": (
            ["eval", "pocket", "--output", str(tmp_path)],
            "--output must be a file in",
        ),
        "only": (["eval", "pocket", "--only", "magic"], "no configuration has 'magic' in its name"),
    }


@pytest.mark.parametrize("mistake", wrong_names := [
    "no file", "no image", "a folder", "method", "schedule", "no budget", "keep in the tower",
    "keep", "keep word",
    "repeats", "seed", "word", "output", "command", "prompt word", "new tokens",
    "device", "device of diagnose",
    "empty folder", "no folder", "alien", "offline", "id", "questions", "eval output",
    "only",
])  # fmt: skip
def test_a_mistake_is_said_in_one_line(mistake, tmp_path, capsys):
    cases = wrong(tmp_path)
    assert list(cases) == wrong_names
    arguments, message = cases[mistake]
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(told) == 1 and message in told[0]
    assert "Traceback" not in "".join(told)


def test_a_processor_that_needs_torchvision_says_what_to_install(
    tmp_path, scene, capsys, monkeypatch
):
    from transformers import AutoProcessor

    def refuse(*_, **__):  # transformers' words, line break first
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    code = main(["run", "--model", "pocket", "--image", scene[0], "--prompt", "describe"])
    said = capsys.readouterr().err
    assert code == 2 and re.search(
        r'pocket needs torchvision, .* pip install torchvision "torch==', said
    )


@pytest.mark.parametrize("absent", ["PIL", "transformers"])
def test_without_an_extra_it_says_which_and_config_still_works(absent):
    code = f"import sys; sys.modules[{absent!r}] = None; from restore_ext.cli import main; "
    code += "sys.exit(main(['config']) or main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "CPU" in done.stdout
    install = 'pip install "transformers>=4.57.6,<6" accelerate pillow tqdm matplotlib'
    assert done.stderr == f"restore-ext: error: demo needs {absent}: {install}\n"


def test_who_stops_reading_gets_no_traceback(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["methods"]) == 141


def test_defaults_are_shown_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "model", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "joined by commas (default: 1,4)" in said and "[1" not in said
    for command, least in (("run", 16), ("serve", 16), ("demo", 0), ("diagnose", 0)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"0: none (default: {least})" in " ".join(capsys.readouterr().out.split())


def test_a_missing_argument_names_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--model", "pocket"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "--image" in said and "--prompt" in said
