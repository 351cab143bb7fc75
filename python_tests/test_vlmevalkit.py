"""The VLMEvalKit launcher, on a stand-in of VLMEvalKit.

The stand-in has what the launcher touches, as VLMEvalKit documents it: a source tree with run.py
beside the package, supported_VLM, a BaseModel whose generate() checks messages and calls
generate_inner(), dump_image(), DATASET_TYPE, and a runner that logs what fails and goes on. It is
not VLMEvalKit: what only the real one would show is not tested here.
"""

import json
import sys

import pytest
import torch

from restore_ext.integrations import vlmevalkit
from restore_ext.integrations.arguments import read
from restore_ext.pocket import WORDS, encode, held_out, load_pocket, parse
from restore_ext.pocket.eval import first_words
from restore_ext.reduce import DEFAULT_METHOD

QUESTIONS = 4
FILES = {
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {}\n",
    "vlmeval/dataset/__init__.py": (
        "def DATASET_TYPE(name):\n    return {'Letters': 'MCQ', 'Scenes': 'VQA'}[name]\n"
    ),
    "vlmeval/vlm/__init__.py": "",
    "vlmeval/vlm/base.py": """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, dump_image):
        self.dump_image_func = dump_image

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)
""",
    "run.py": """
import argparse, json, logging, os, sys
from vlmeval.config import supported_VLM

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--work-dir", default="outputs")
    args = parser.parse_args()
    for name in args.model:
        for data in args.data:
            try:
                model = supported_VLM[name](use_vllm=False)
                model.set_dump_image(lambda line: [line["path"]])
                said = []
                for line in map(json.loads, open(data + ".jsonl")):
                    if model.use_custom_prompt(data):
                        message = model.build_prompt(line, dataset=data)
                    else:
                        message = [
                            dict(type="image", value=line["path"]),
                            dict(type="text", value=line["question"]),
                        ]
                    said.append([message[-1]["value"], None if data == "Letters" else
                                 model.generate(message=message, dataset=data)])
                os.makedirs(os.path.join(args.work_dir, name), exist_ok=True)
                with open(os.path.join(args.work_dir, name, data + ".json"), "w") as file:
                    json.dump(said, file)
            except Exception:
                logging.exception("combination failed, skipping")
""",
}


@pytest.fixture
def kit(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    rows = []
    for i in range(QUESTIONS):
        scene = held_out(i)
        scene.image.save(tmp_path / f"{i}.png")
        question = " ".join(parse(scene.question.text))
        rows.append({"path": str(tmp_path / f"{i}.png"), "question": question})
    (tmp_path / "Scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    nan = float("nan")
    letters = {**rows[0], "hint": "look", "A": "red", "B": "blue", "C": nan}
    (tmp_path / "Letters.jsonl").write_text(json.dumps(letters))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    ours = "restore_ext.integrations.vlmevalkit.model"
    for name in [n for n in sys.modules if n.split(".")[0] == "vlmeval" or n == ours]:
        del sys.modules[name]


POCKET = ["pretrained=pocket", "device=cpu", "max_new_tokens=1"]


def test_the_runner_asks_our_model(kit):
    import restore_ext

    command = [*POCKET, "method=divprune", "keep=64", "--data", "Scenes", "--work-dir", "out"]
    assert vlmevalkit.main(command) == 0
    said = json.loads((kit / "out/restore_ext-pocket-divprune-64-restore/Scenes.json").read_text())
    model, processor = load_pocket()
    scenes = [held_out(i) for i in range(QUESTIONS)]
    inputs = encode(processor, [s.image for s in scenes], [s.question.text for s in scenes])
    with torch.no_grad(), restore_ext.attach(model, method="divprune", keep=64):
        assert [answer for _, answer in said] == [WORDS[i] for i in first_words(model, inputs)]


def test_letters_are_asked_for_as_llava_does(kit):
    command = [*POCKET, "method=none", "--model", "mine", "--letter-prompt", "--data", "Letters"]
    assert vlmevalkit.main([*command, "--vlmevalkit", str(kit)]) == 0
    ((text, _),) = json.loads((kit / "outputs/mine/Letters.json").read_text())
    question = " ".join(parse(held_out(0).question.text))
    ask = "Answer with the option's letter from the given choices directly."
    assert text == f"look\n{question}\nA. red\nB. blue\n{ask}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=best"], "method must be one of"),
        (["keeep=1"], "there is no argument keeep"),
        (["divprune"], "must be NAME=VALUE, got divprune"),
        (["--vlmevalkit", "/nowhere"], "--vlmevalkit must be the folder"),
        # Found out by the runner's own call, which the runner swallows.
        (["method=fastv", "options={'layers': [9]}"], "layers"),
    ],
)
def test_a_wrong_argument_is_one_line(kit, words, said, capsys):
    mine = [word for word in words if not word.startswith("-") and word != "/nowhere"]
    rest = words[len(mine) :]
    assert vlmevalkit.main([*POCKET, *mine, *rest, "--data", "Scenes"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("vlmevalkit: error")]
    assert said in line


def test_without_vlmevalkit_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(vlmevalkit, "find_spec", lambda name: None)
    assert vlmevalkit.main(["pretrained=pocket"]) == 2
    assert "needs vlmeval: git clone" in capsys.readouterr().err


def test_names_of_results_tell_runs_apart():
    given = [{}, {"keep": 128}, {"restore": False}, {"method": "none"}, {"keep_ratio": 0.2}]
    names = [vlmevalkit.label(read({"pretrained": "a/llava-1.5", **more})) for more in given]
    assert names[0] == f"restore_ext-llava-1.5-{DEFAULT_METHOD}-64-restore"
    assert len(set(names)) == 5 and names[3] == "restore_ext-llava-1.5-all"
