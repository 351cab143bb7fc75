"""What a diagnosis draws, and restore-ext diagnose on the pocket model."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family_checks import ROWS, model, row_inputs
from hf_harness import forward
from PIL import Image

import restore_ext
from restore_ext.cli import main
from restore_ext.hf.diagnosis import maps
from restore_ext.hf.diagnosis.maps import as_picture, draw_attention, draw_tokens, find_bases
from restore_ext.hf.diagnosis.plots import plot_distances, plot_shares
from restore_ext.picture import MARGIN, SIDE
from restore_ext.pocket import encode, held_out, load_pocket
from restore_ext.testing.models import TINY, join_rows

# ROWS[0] has pictures of 8 x 12 and 8 x 8 patches; some families have one size of picture.
SQUARE = [(8, 8), (8, 8)]
HALVED = [(4, 4), (4, 4)]
GRIDS = {
    "llava": SQUARE,
    "internvl": HALVED,
    "idefics3": HALVED,
    "smolvlm": HALVED,
    "aya_vision": HALVED,
    "paligemma": SQUARE,
    "gemma3": HALVED,
    "mistral3": [(4, 6), (4, 4)],
    "pixtral": [(8, 12), (8, 8)],
    "qwen2_vl": [(4, 6), (4, 4)],
    "qwen2_5_vl": [(4, 6), (4, 4)],
    "qwen3_vl": [(4, 6), (4, 4)],
    "glm4v": [(4, 6), (4, 4)],
}
OF_TILES = {"llava_next", "llava_onevision"}


def colours(image):
    few = image.convert("RGB").resize((300, 200), Image.Resampling.NEAREST)
    return len(few.getcolors(1 << 16))


@pytest.mark.parametrize("family", sorted({*GRIDS, *OF_TILES}))
def test_every_family_has_its_grid_or_a_reason(family):
    alone = row_inputs(family, [ROWS[0]])
    inputs = join_rows(alone)
    with restore_ext.attach(model(family), method="uniform", keep_ratio=0.5) as handle:
        forward(model(family), inputs)
        tokens = [image.tokens_before for image in handle.last.images]
    bases = find_bases(model(family), inputs, tokens)
    assert len(bases) == len(tokens) == 2
    if family in OF_TILES:
        assert all(base.grid is None and "several tiles" in base.reason for base in bases)
        return
    assert [base.grid for base in bases] == GRIDS[family]
    assert [h * w for h, w in GRIDS[family]] == tokens
    for base in bases:
        if base.pixels is not None:
            h, w = base.pixels.shape[1:]
            assert h * base.grid[1] == w * base.grid[0]


def test_a_sheet_has_the_proportions_of_its_grid():
    inputs = join_rows(row_inputs("qwen2_5_vl", [ROWS[0]]))
    options = {"method": "uniform", "keep_ratio": 0.5, "new_tokens": 1}
    found = restore_ext.diagnose(model("qwen2_5_vl"), inputs, **options)
    sheet = draw_attention(found, 0, Image.new("RGB", (90, 60)), (4, 6), "where")
    assert sheet.size == (MARGIN + 3 * (SIDE + MARGIN), 76 + 2 * (SIDE * 4 // 6 + 76))
    assert colours(sheet) > 50


def test_the_cases_are_all_families():
    assert {*GRIDS, *OF_TILES, "paligemma2", "llava_onevision_several"} == {*TINY}


def test_a_picture_is_what_the_model_sees():
    loaded = load_pocket()[1]
    scene = held_out(3).image
    inputs = encode(loaded, [scene], ["how many objects ?"])
    of = loaded.image_processor
    [base] = find_bases(None, inputs, [576])
    assert base.grid == (24, 24)
    again = np.asarray(as_picture(base.pixels, of.image_mean, of.image_std)).astype(int)
    assert (abs(again - np.asarray(scene.convert("RGB")).astype(int)) <= 1).all()


@pytest.fixture(scope="module")
def diagnosis():
    pocket, processor = load_pocket()
    scene = held_out(0)
    inputs = encode(processor, [scene.image], [scene.question.text])
    return restore_ext.diagnose(pocket, inputs, method="divprune", keep=64, new_tokens=1)


def panel(sheet, number, row=0):
    left, top = MARGIN + number * (SIDE + MARGIN), 76 + row * (SIDE + 76)
    return np.asarray(sheet)[top : top + SIDE, left : left + SIDE].astype(int)


def test_heat_maps_are_bright_where_attention_is(diagnosis):
    picture = Image.new("RGB", (96, 96), (90, 90, 90))
    sheet = draw_attention(diagnosis, 0, picture, (24, 24), "what")
    assert sheet.size[0] == MARGIN + 4 * (SIDE + MARGIN)
    for row, queries in enumerate(("text", "last")):
        runs = [diagnosis.full, *diagnosis.ways.values()]
        most = float(runs[0].attention[queries][0].mean(0).max())
        for number, run in enumerate(runs):
            cells = panel(sheet, number, row)[10::20, 10::20].sum(-1).flatten()
            value = run.attention[queries][0].mean(0).clamp(max=most)
            order = value.argsort()
            # A brighter cell has no less, but for colours that are rounded.
            assert (np.diff(cells[order.numpy()]) >= -3).all()
            assert cells.max() - cells.min() > 200
    left = diagnosis.ways["original"].reductions[0].group[0] >= 0
    dropped = diagnosis.ways["original"].attention["text"][0][:, ~left]
    assert left.sum() == 64 and not dropped.any()


def test_token_sheets_show_what_is_left(diagnosis):
    picture = Image.new("RGB", (96, 96), (200, 30, 30))
    sheet = draw_tokens(diagnosis, 0, picture, (24, 24), "what")
    whole, plain, restore = (panel(sheet, i)[3::20, 3::20].reshape(-1, 3) for i in range(3))
    assert (whole == (200, 30, 30)).all()
    red = [(x == (200, 30, 30)).all(1).sum() for x in (plain, restore)]
    assert red == [64, 32]
    assert (plain.max(1) < 70).sum() == 576 - 64 and (restore.max(1) < 70).sum() == 0


def test_a_sheet_says_where_nothing_was_reduced():
    some, none = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    group = torch.arange(4)[None]
    whole = SimpleNamespace(kept=some, merged=none, group=group)
    assert maps._said_of(whole) == "all 4 kept"
    less = SimpleNamespace(kept=some[:, :2], merged=none[:, :2], group=group.clamp_max(1))
    assert maps._said_of(less) == "2 kept, the rest dropped"


def test_plots_draw_the_numbers(diagnosis, tmp_path):
    summary = diagnosis.summary()
    figure = plot_shares(summary)
    runs = {"all tokens": summary["full"]} | {
        {"reindexed": "plain, re-indexed", "original": "plain, original positions"}.get(
            n, "RESTORE"
        ): w
        for n, w in summary["ways"].items()
    }
    for axes, queries in zip(figure.axes, ("visual", "text", "last"), strict=True):
        assert {line.get_label() for line in axes.lines} == {*runs}
        for line in axes.lines:
            assert line.get_ydata().tolist() == runs[line.get_label()]["share"][queries]
    bars = plot_distances(summary)
    heights = [bar.get_height() for bar in bars.axes[0].patches]
    groups = ("overall", "visual", "text", "last")
    assert heights == [
        way["distance"][group]["mean"] for way in summary["ways"].values() for group in groups
    ]
    for name, plot, size in (("a", figure, (1210, 374)), ("b", bars, (770, 374))):
        plot.savefig(tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as png:
            assert png.size == size
            assert colours(png) > 20


def test_what_a_layer_lacks_is_no_point_of_its_curve():
    curve = {"share": {kind: [0.5, None] for kind in ("visual", "text", "last")}}
    number = {"mean": None, "half_width": None}
    way = {**curve, "distance": dict.fromkeys(("overall", "visual", "text", "last"), number)}
    summary = {"full": curve, "ways": {"original": way}}
    assert np.isnan(plot_shares(summary).axes[0].lines[1].get_ydata()).tolist() == [False, True]
    assert all(np.isnan(bar.get_height()) for bar in plot_distances(summary).axes[0].patches)


def cells(out):
    """The rows of the table by their label."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    rows = [re.split(r"  +", line) for line in lines[first : lines.index("", first)]]
    return {row[0]: row[1:] for row in rows}


def test_the_command_writes_what_it_says(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    given = ["--method", "fastv", "--keep", "64", "--new-tokens", "2", "--output", str(folder)]
    assert main(["diagnose", "--model", "pocket", "--seed", "2", *given]) == 0
    out = capsys.readouterr().out
    assert f"prompt     {held_out(2).question.text}\nanswer     " in out
    rows = cells(out)
    summary = json.loads((folder / "diagnosis.json").read_text())
    assert summary["model"] == "pocket" and summary["options"]["method"] == "fastv"
    assert list(rows) == ["all tokens", "plain, re-indexed", "plain, original positions", "RESTORE"]
    assert rows["all tokens"] == ["576"]
    way = summary["ways"]["restore"]
    want = [way["distance"]["overall"], way["cosine"]["visual"], way["cosine"]["last"]]
    want += [way["kl"]["first"], way["top1"]["first"], way["kl"]["answer"], way["top1"]["answer"]]
    assert rows["RESTORE"] == ["576 to 64", *(f"{x['mean']:.3f}" for x in want)]
    names = ["diagnosis.json", "shares.png", "distances.png", "tokens_0.png", "attention_0.png"]
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    assert all(str(folder / name) in out for name in names)
    for name in names[1:]:
        with Image.open(folder / name) as png:
            assert colours(png) > 20


def test_scenes_are_averaged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("restore_ext.cli.diagnose.BATCH", 2)
    given = ["--keep", "64", "--method", "uniform", "--output", str(tmp_path), "--scenes", "3"]
    assert main(["diagnose", "--model", "pocket", "--seed", "1", *given]) == 0
    out = capsys.readouterr().out
    assert "mean of 3 scenes, ± 95 % interval" in out
    summary = json.loads((tmp_path / "diagnosis.json").read_text())
    assert summary["prompts"] == 3 and summary["layers"] == 4
    pocket, processor = load_pocket()
    scenes = [held_out(number) for number in (1, 2, 3)]
    inputs = encode(processor, [s.image for s in scenes], [s.question.text for s in scenes])
    found = restore_ext.diagnose(pocket, inputs, method="uniform", keep=64, new_tokens=1)
    for name in ("original", "restore"):
        apart = found.distance(name)["overall"]
        said = summary["ways"][name]["distance"]["overall"]
        assert said["mean"] == pytest.approx(float(apart.mean()), abs=1e-5)
        assert said["half_width"] == pytest.approx(1.96 * float(apart.std()) / 3**0.5, abs=1e-4)
    assert re.search(r"RESTORE +64 +0\.\d{3} ± 0\.\d{3} ", out)


def test_a_schedule_and_the_guard_are_what_attach_is_given(tmp_path, capsys):
    schedule = tmp_path / "found.json"
    schedule.write_text('{"layers": [576, 300, 40, 40]}')
    given = ["--model", "pocket", "--output", str(tmp_path / "out")]
    assert main(["diagnose", *given, "--schedule", str(schedule)]) == 0
    assert cells(capsys.readouterr().out)["RESTORE"][0] == "576 to 40"
    assert main(["diagnose", *given, "--keep", "64", "--min-visual-tokens", "577"]) == 0
    out = capsys.readouterr().out
    assert cells(out)["RESTORE"][0] == "576" and "nothing was reduced: all visual tokens" in out


def wrong(tmp_path):
    picture = str(tmp_path / "ok.png")
    held_out(0).image.save(picture)
    file = tmp_path / "file"
    file.write_text("")
    asked = ["--image", picture, "--prompt", "how many objects ?"]
    return {
        "no image": (["--model", "elsewhere"], "--image must be given for elsewhere"),
        "no prompt": (["--image", picture], "--prompt must be given with --image"),
        "scenes of an image": ([*asked, "--scenes", "3"], "--scenes must not be given"),
        "no scenes": (["--scenes", "0"], "--scenes must be at least 1, got 0"),
        "seed": (["--seed", "-1"], "--seed must be at least 0, got -1"),
        "words": (["--new-tokens", "0"], "--new-tokens must be at least 1, got 0"),
        "room": (["--new-tokens", "9999"], "--new-tokens must be at most 14"),
        "keep": (["--keep", "0"], "--keep must be at least 1, got 0"),
        "budget": (["--method", "vtw", "--keep", "3"], "--keep must not be given with"),
        "method": (["--method", "best"], "--method must be one of"),
        "schedule": (["--schedule", str(tmp_path / "none.json")], "--schedule: "),
        "word": (["--prompt", "what is a zebra ?"], "does not know 'zebra'"),
        "word of scenes": (["--prompt", "zebra ?", "--scenes", "2"], "does not know 'zebra'"),
        "folder": (["--output", str(file)], f"--output: {file} cannot be made a folder"),
        "model": (["--model", str(tmp_path), *asked], "has no config.json"),
    }


MISTAKES = (
    *("no image", "no prompt", "scenes of an image", "no scenes", "seed", "words", "room", "keep"),
    *("budget", "method", "schedule", "word", "word of scenes", "folder", "model"),
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, mistake):
    options, said = wrong(tmp_path)[mistake]
    given = {"--model": "pocket", "--output": str(tmp_path / "out")}
    base = [x for pair in given.items() if pair[0] not in options for x in pair]
    assert main(["diagnose", *base, *options]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and said in told[0]
    assert {*wrong(tmp_path)} == {*MISTAKES}


def test_without_matplotlib_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "restore_ext.cli.diagnose", raising=False)
    assert main(["diagnose", "--model", "pocket"]) == 2
    assert re.search(
        r"diagnose needs matplotlib: pip install .* matplotlib$", capsys.readouterr().err
    )
