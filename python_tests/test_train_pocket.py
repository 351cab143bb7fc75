"""Training the built-in model: what it is shown, going on after a break, growing, exporting."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from bench import train_pocket
from bench.export_pocket import export
from bench.train_pocket import Settings, Trainer, batch, build, grow, parse_mix
from restore_ext.pocket import load_pocket
from restore_ext.pocket.model import FOLDER
from restore_ext.pocket.scenes import COLOURS, KINDS, SHAPES, WORDS

SMALL = Settings(patch=16, batch=2, questions=2, steps=4)  # 36 visual tokens


def test_labels_are_the_answers_and_the_description():
    pixels, ids, labels, present = batch(np.random.default_rng(0), SMALL)
    assert pixels.shape == (2, 3, 96, 96) and ids.shape == labels.shape
    for row, row_labels, objects in zip(ids, labels, present, strict=True):
        text = " ".join(WORDS[i] for i in row)
        assert text.count("<image>") == 36 and text.count("user :") == 3
        assert torch.equal(row[row_labels != -100], row_labels[row_labels != -100])
        learnt = " ".join(WORDS[i] for i in row_labels if i != -100)
        answers = re.findall(r"\? assistant : (\w+) user", text)
        (described,) = re.findall(r"describe assistant : (.*</s>)", text)
        assert len(answers) == 2 and learnt == " ".join([*answers, described])
        things = re.findall(r"(\w+) (\w+) (\w+) ;", described)
        named = {SHAPES.index(s) * len(COLOURS) + list(COLOURS).index(c) for _, c, s in things}
        assert named == set(objects.nonzero().flatten().tolist()) and 2 <= len(things) <= 5


def test_a_mix_is_read_from_the_command_line():
    assert parse_mix("rel=3,color=1") == (0.25, 0, 0, 0, 0.75, 0)
    for bad in ("size=1", "rel=0", "rel=1,count=-0.5"):
        with pytest.raises(train_pocket.argparse.ArgumentTypeError, match="KIND=SHARE"):
            parse_mix(bad)
    mixed = Settings(patch=16, batch=8, questions=8, steps=1, mix=parse_mix("count=1"))
    _, ids, *_ = batch(np.random.default_rng(0), mixed)
    words = Counter(WORDS[i] for i in ids.flatten())
    assert words["many"] == 64 and words["where"] == 0 and len(KINDS) == 6


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    whole = Trainer(SMALL)
    losses = [whole.advance() for _ in range(4)]
    broken = Trainer(SMALL)
    assert [broken.advance() for _ in range(2)] == losses[:2]
    broken.save(tmp_path)
    torch.rand(7)  # what happens in between must not matter
    resumed = Trainer.resume(tmp_path)
    assert resumed.done == 0.5
    assert [resumed.advance() for _ in range(2)] == losses[2:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert torch.equal(whole.head.weight, resumed.head.weight)
    assert not torch.equal(whole.head.weight, broken.head.weight)


def test_the_command_trains_saves_and_goes_on(tmp_path, capsys):
    out = str(tmp_path)
    start = ["train", "--out", out, "--patch", "16", "--batch", "1", "--questions", "1"]
    train_pocket.main([*start, "--steps", "1"])
    assert Trainer.resume(tmp_path).step == 1
    train_pocket.main(["train", "--out", out, "--resume", "--steps", "2"])
    assert Trainer.resume(tmp_path).step == 2
    assert "step 2" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="holds no interrupted run"):
        train_pocket.main(["train", "--out", str(tmp_path / "no"), "--resume"])


def test_growing_keeps_the_answer_to_a_flat_picture():
    torch.manual_seed(0)
    coarse, fine = build(16), build(8)
    grow(fine, coarse.state_dict())
    flat = torch.full((1, 3, 96, 96), 0.7)
    seen = []
    for model in (coarse, fine):
        (kernel,) = (p for name, p in model.named_parameters() if "patch_embedding" in name)
        seen.append(torch.nn.functional.conv2d(flat, kernel, stride=kernel.shape[-1]))
    assert seen[0].shape[-1] == 6 and seen[1].shape[-1] == 12
    torch.testing.assert_close(seen[1][0, :, 0, 0], seen[0][0, :, 0, 0])
    same = build(16)
    grow(same, coarse.state_dict())
    for name, weight in coarse.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name


def test_an_export_loads_and_says_the_same(tmp_path):
    trainer = Trainer(SMALL)
    trainer.save(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "package")
    model, processor = load_pocket(tmp_path / "package")
    assert {f.name for f in (tmp_path / "package").iterdir()} == {f.name for f in FOLDER.iterdir()}
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    pixels, ids, *_ = batch(np.random.default_rng(0), SMALL)
    trainer.model.eval()
    with torch.no_grad():
        wanted, got = (m(input_ids=ids, pixel_values=pixels).logits for m in (trainer.model, model))
    torch.testing.assert_close(got, wanted)
    image = train_pocket.draw(np.random.default_rng(0))[0]
    text = processor(images=[image], text=["<image>"], return_tensors="pt")
    assert text["input_ids"].tolist() == [[3] * 36]


def test_an_export_of_the_package_is_the_package(tmp_path):
    export(FOLDER, tmp_path)
    for file in FOLDER.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_an_export_refuses_another_vocabulary(tmp_path):
    config = json.loads((FOLDER / "config.json").read_text())
    config["text_config"]["vocab_size"] = 66
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vocab_size must be 65, got 66"):
        export(tmp_path, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_settings_name_what_is_wrong():
    for wrong, message in (
        ({"patch": 7, "steps": 1}, "patch must divide 96, got 7"),
        ({}, "one of steps and minutes"),
        ({"steps": 1, "minutes": 1.0}, "one of steps and minutes"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)
