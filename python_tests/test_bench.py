"""restore-ext bench: what the numbers are made of, and what is printed and written of them."""

import importlib.util
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from restore_ext import ops
from restore_ext.bench import generation, guard, prefill, serving
from restore_ext.bench.ops import measure_ops, problems
from restore_ext.bench.random_llava import Shape, build, prompt
from restore_ext.bench.rounds import Spread, difference, ratio, take_turns
from restore_ext.bench.table import Column, bars, markdown, read_csv, text, write_csv
from restore_ext.bench.ways import ALL_TOKENS, ATTENTIONS, Refused, Way, attentions, ways_of
from restore_ext.cli import main
from restore_ext.hf import images
from restore_ext.hf.handle import handle_of
from restore_ext.methods import find_card, list_methods
from restore_ext.testing.models import image_tokens, make_inputs, tiny_model

TINY = Shape.of(4, 64, 6)
SLEEP = 0.05
HAS_PLOTS = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def llava():
    return build(TINY, "cpu", torch.float32), prompt(TINY, 1, "cpu", torch.float32)


@pytest.fixture
def slow(monkeypatch):
    """Every reduction behind the projector takes SLEEP longer."""
    reduce = images.reduce_tokens

    def slower(*args, **options):
        time.sleep(SLEEP)
        return reduce(*args, **options)

    monkeypatch.setattr(images, "reduce_tokens", slower)


def test_medians_and_ratios_are_of_rounds():
    base, values = [4.0, 8.0, 2.0, 10.0, 6.0], [2.0, 2.0, 2.0, 2.0, 6.0]
    assert Spread.of(base) == Spread(6.0, 3.6, 8.4)
    assert ratio(base, values).median == 2.0, "not the ratio of the medians, which is 3"
    assert difference(base, values).median == 2.0
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread(0.0012, 0.001, 0.002).columns("x", 1e3, 1) == {
        "x": "1.2",
        "x_p20": "1.0",
        "x_p80": "2.0",
    }
    turns = []
    readings = {name: lambda name=name: turns.append(name) or len(turns) for name in "ab"}
    assert take_turns(readings, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert "".join(turns) == "ababab"


def test_the_break_even_is_where_it_pays_from_there_on():
    def rows(way, p20):
        return [{"way": way, "before": n, "speedup": p, "speedup_p20": p} for n, p in p20.items()]

    found = guard.break_evens(
        [
            {"way": ALL_TOKENS, "before": "9"},
            *rows("late", {"9": "1.20", "16": "0.99", "100": "1.01", "36": "1.10"}),
            *rows("never", {"9": "1.20", "16": "1.00"}),
            *rows("always", {"9": "1.01", "16": "1.50"}),
            {"way": "refused", "before": "9", "note": "refused: no"},
        ]
    )
    assert found == {"late": 36, "never": None, "always": 9, "refused": None}


def test_a_method_that_takes_longer_says_so(llava, slow):
    model, inputs = llava
    ways = ways_of(["uniform", "fastv"], 9, model, inputs)
    done = []
    rows = prefill.measure_prefills(
        model, inputs, ways, 2, time.perf_counter, lambda: done.append(1)
    )
    by_name = {row["way"]: row for row in rows}
    stock, uniform, fastv = (by_name[n] for n in (ALL_TOKENS, "uniform + RESTORE", "fastv plain"))
    assert len(done) == 3 * len(ways) == 15
    assert "reduction_ms" not in stock and "speedup" not in stock
    assert 1e3 * SLEEP <= float(uniform["reduction_ms"]) <= float(uniform["prefill_ms"])
    assert float(uniform["prefill_ms"]) >= 1e3 * SLEEP
    assert float(uniform["saved_ms"]) < -20 and float(uniform["speedup"]) < 0.7
    assert 0 < float(fastv["reduction_ms"]) < float(fastv["prefill_ms"])
    assert [row["tokens"] for row in (stock, uniform, fastv)] == ["36", "9", "36 to 9"]
    assert handle_of(model) is None


def test_every_method_is_measured_or_refused_with_a_reason(llava):
    model, inputs = llava
    ways = ways_of(list_methods(), 9, model, inputs)
    wanted = {(way.method, way.restore) for way in ways}
    assert wanted == {
        (None, False),
        *((name, False) for name in list_methods()),
        *((name, True) for name in list_methods() if find_card(name).restores),
    }
    rows = prefill.measure_prefills(model, inputs, ways, 1, time.thread_time)
    assert [row["way"] for row in rows] == [way.name for way in ways]
    assert all("speedup" in row and float(row["reduction_ms"]) > 0 for row in rows[1:])
    refused = prefill.measure_prefills(
        model, inputs, [ways[0], Way("tome_vit", True, {"keep": 1})], 1, time.thread_time
    )[1]
    assert refused["note"].startswith("refused: keep must be at least") and "tokens" not in refused


@pytest.fixture(scope="module")
def qwen():
    return tiny_model("qwen2_5_vl"), make_inputs("qwen2_5_vl")


def test_baselines_have_their_rows_and_several_ask_at_once(qwen, monkeypatch):
    """On a family that takes no `downsample`; two threads meet in the middle of their answers."""
    model, inputs = qwen
    meet = threading.Barrier(2, timeout=20)
    answer = generation.time_answer

    def answered(*given):
        if threading.current_thread() is not threading.main_thread() and at_once == 2:
            meet.wait()
        return answer(*given)

    monkeypatch.setattr(serving, "time_answer", answered)
    ways = ways_of(["random", "downsample"], 5, model, inputs)
    measured = serving.Serving(model, inputs, ways, 1, 1, time.perf_counter, "eager", "sdpa")
    rows = []
    for at_once in (1, 2):
        rows += measured.measure([at_once], [at_once])
    cells = {(r["way"], r["batch"], r["concurrency"]): r for r in rows}
    assert len(cells) == len(rows) == 2 * len(ways)
    (tokens,) = image_tokens(inputs)
    text_config = model.config.text_config
    per_token = 2 * 4 * text_config.num_hidden_layers * text_config.num_key_value_heads * 32
    for (way, batch, at_once), row in cells.items():
        if way == "downsample plain":
            assert "refused: method downsample needs a token of every patch" in row["note"]
            assert "ttft_ms" not in row
            continue
        left = tokens if way == ALL_TOKENS else 5
        assert row["tokens"] == str(left)
        length = inputs["input_ids"].shape[1] - tokens + left
        assert float(row["kv_kib"]) == round(int(at_once) * int(batch) * per_token * length / 1024)
        assert float(row["peak_mib_p20"]) <= float(row["peak_mib"]) <= float(row["peak_mib_p80"])
        assert float(row["ttft_ms"]) > 0 and float(row["token_ms"]) > 0
        assert row["attention"] == ("eager" if way == ALL_TOKENS else "restore_ext")
        assert ("speedup" in row) == (way != ALL_TOKENS)
        alone = way != ALL_TOKENS and at_once == "1"
        assert ("reduction_ms" in row) == alone
        if alone:
            share = float(row["reduction_share"].split()[0])
            assert share == pytest.approx(
                100 * float(row["reduction_ms"]) / float(row["ttft_ms"]), abs=2
            )
    assert model.config._attn_implementation == "sdpa"


def test_the_unhooked_model_has_its_fastest_attention(llava, monkeypatch):
    model, inputs = llava
    answer = generation.time_answer

    def uneven(asked, *given):
        first, rest = answer(asked, *given)
        return first + (asked.config._attn_implementation == "sdpa"), rest

    monkeypatch.setattr(serving, "time_answer", uneven)
    rows = serving.measure_attentions(model, inputs, 1, time.perf_counter)
    assert [row["attention"] for row in rows] == ["eager", "sdpa", *ATTENTIONS[2:]]
    assert model.config._attn_implementation == "eager"
    assert all(row["note"] == "not used: needs a GPU" for row in rows[2:])
    refusing = SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(_attn_implementation="sdpa"),
        set_attn_implementation=lambda name: 1 / (name == "sdpa"),
    )
    monkeypatch.setattr("restore_ext.bench.ways.generate", lambda *_: None)
    monkeypatch.setattr("restore_ext.bench.ways.REFUSALS", (ZeroDivisionError,))
    said = dict(attentions(refusing, inputs))
    assert said["sdpa"] == "" and "division" in said["eager"]
    model.set_attn_implementation("sdpa")


def test_peak_memory_is_what_all_requests_at_once_take_on_top(llava, monkeypatch):
    model, inputs = llava
    before = torch.ones(16 << 20)  # 64 MiB that are there already
    meet = threading.Barrier(2, timeout=20)

    def answer(*_):
        taken = torch.ones(32 << 20)
        meet.wait()
        return float(taken[-1]), 0.0

    monkeypatch.setattr(serving, "time_answer", answer)
    ways = ways_of([], 4, model, inputs)
    measured = serving.Serving(model, inputs, ways, 1, 3, time.perf_counter, "sdpa", "sdpa")
    seen = serving.Seen()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            measured._turn(pool, 2, inputs, ways[0], seen)
    if not seen.peak:
        pytest.skip("this system does not say")
    assert len(seen.peak) == 2 and before.sum() == len(before)
    assert all(240 << 20 < peak < 330 << 20 for peak in seen.peak), "of both requests together"
    monkeypatch.setattr(generation, "_reset_high_water", lambda: False)
    assert generation.with_peak(lambda: 3, torch.device("cpu")) == (3, None)


def test_operators_are_right_before_they_are_fast(monkeypatch):
    asked = [p for p in problems() if p.op in ("merge_tokens", "row_scores")]
    assert {p.op for p in problems()} == {
        name for name in vars(ops) if name[0] != "_" and hasattr(torch.ops.restore_ext, name)
    }
    rows = measure_ops("cpu", torch.float32, 1, time.thread_time, asked=asked)
    assert [row["way"] for row in rows] == [p.op for p in asked]
    assert all(float(row["plain_us"]) > 0 and float(row["ours_us"]) > 0 for row in rows)
    scores = ops.row_scores
    monkeypatch.setattr(ops, "row_scores", lambda **given: 1.01 * scores(**given))
    with pytest.raises(AssertionError, match="the relative error is 1"):
        measure_ops("cpu", torch.float32, 1, time.thread_time, asked=asked[1:])


def test_a_table_reads_back_as_it_was_written(tmp_path):
    columns = [Column("way", "method", number=False), Column("ms", "ms", spread=True)]
    rows = [
        {"way": "a", "ms": "1.5", "ms_p20": "1.0", "ms_p80": "2.0"},
        {"way": "longer", "note": "refused: 1, 2"},
    ]
    write_csv(tmp_path / "t.csv", rows)
    again = read_csv(tmp_path / "t.csv")
    wanted = "| method | ms |\n| --- | ---: |\n| a | 1.5 (1.0 to 2.0) |\n| longer |  |"
    assert markdown(rows, columns) == markdown(again, columns) == wanted
    assert again[1]["note"] == "refused: 1, 2"
    lines = text(rows, columns).splitlines()
    assert lines[2] == "a       1.5 (1.0 to 2.0)" and lines[3] == "longer"


@pytest.mark.skipif(not HAS_PLOTS, reason="needs matplotlib")
def test_the_plot_has_a_bar_for_each_row_that_was_measured(tmp_path):
    from PIL import Image

    row = {"ms": "1.5", "ms_p20": "1.0", "ms_p80": "2.0"}
    sizes = []
    for count in (1, 30):
        rows = {f"{i} + RESTORE": row for i in range(count)} | {"none": {"note": "refused"}}
        bars(tmp_path / "t.png", rows, "ms", "title", "ms", 1.0)
        with Image.open(tmp_path / "t.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][1] > sizes[0][1] and sizes[1][0] == sizes[0][0]


RANDOM = ["--model", "random", "--shape", "2,64,4", "--keep", "4", "--rounds", "1"]


def test_the_commands_print_and_write(tmp_path, capsys, monkeypatch):
    if not HAS_PLOTS:  # all but the plot
        monkeypatch.setattr("restore_ext.cli.bench.find_spec", lambda _: True)
        monkeypatch.setattr("restore_ext.cli.bench.bars", lambda *_: None)
    out = ["--output", str(tmp_path)]
    given = ["bench", "model", *RANDOM, "--methods", "uniform", "--batch", "2", *out]
    assert main([*given, "--new-tokens", "1"]) == 0
    said = capsys.readouterr().out
    command = "restore-ext bench model --model random --shape 2,64,4 --keep 4 --rounds 1 --methods"
    assert f"`{command} uniform --batch 2 --new-tokens 1`: random LLaVA, 2 x 64, 16" in said
    rows = read_csv(tmp_path / "model.csv")
    assert [row["way"] for row in rows] == [
        "all tokens",
        "random plain",
        "random + RESTORE",
        "downsample plain",
        "uniform plain",
        "uniform + RESTORE",
    ]
    assert {(row["batch"], row["clock"], row["torch"]) for row in rows} == {
        ("2", "wall", torch.__version__)
    }
    assert read_csv(tmp_path / "attention.csv")[0]["attention"] in ("sdpa", "eager")
    assert "| uniform + RESTORE | restore_ext | 2 | 1 | 4 |" in (tmp_path / "model.md").read_text()
    given = ["bench", "guard", "--layers", "1", "--hidden", "64", "--sides", "3,4"]
    assert main([*given, "--methods", "uniform", "--rounds", "1", *out]) == 0
    assert "uniform + RESTORE: faster " in capsys.readouterr().out
    assert [row["before"] for row in read_csv(tmp_path / "guard.csv")] == ["9", "9", "16", "16"]
    given = ["bench", "guard", "--layers", "1", "--hidden", "64", "--sides", "3"]
    assert main([*given, "--methods", "downsample", "--rounds", "1"]) == 0
    assert "downsample plain: " in capsys.readouterr().out, "RESTORE has nothing to add to it"
    before = torch.get_num_threads()
    given = ["bench", "methods", *RANDOM, "--methods", "uniform,schedule"]
    assert main([*given, "--threads", "1", "--clock", "thread"]) == 0
    torch.set_num_threads(before)
    said = capsys.readouterr().out
    assert "1 thread, the thread's own time" in said and "16 to 4" in said
    assert "random plain " in said and "downsample plain " in said, "asked for or not"
    assert (tmp_path / "model.png").exists() == HAS_PLOTS


MISTAKES = {
    "clock": (["--clock", "thread"], "--clock thread needs --threads 1 and --device cpu"),
    "at once": (
        ["--clock", "thread", "--threads", "1", "--concurrency", "1,2"],
        "and no concurrency",
    ),
    "method": (["--methods", "best"], "--methods must be among random, uniform"),
    "batch": (["--batch", "1,0"], "argument --batch: must be an int of at least 1, got 0"),
    "new tokens": (["--new-tokens", "-1"], "must be an int of at least 0, got -1"),
    "room": (["--new-tokens", "2000"], "--new-tokens must be at most"),
    "shape": (["--model", "random", "--shape", "2,64"], "--shape must be LAYERS,WIDTH,SIDE"),
    "width": (["--model", "random", "--shape", "2,448,4"], "--shape: the widths 448 of the"),
    "device": (["--model", "random", "--device", "teapot"], "--device: teapot cannot be used"),
    "word": (["--prompt", "is it a cat ?"], "does not know 'it', 'cat'"),
    "image": (["--image", "no.png"], "--image: there is no file no.png"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_one_line(mistake, capsys):
    arguments, message = MISTAKES[mistake]
    try:
        code = main(["bench", "model", *arguments])
    except SystemExit as stop:
        code = stop.code
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(told) == 1 and message in told[0]


def test_a_plot_without_matplotlib_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("restore_ext.cli.bench.find_spec", lambda _: None)
    monkeypatch.setattr("restore_ext.cli.bench.load", None)
    assert main(["bench", "model", "--output", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_way_that_the_model_cannot_go_is_refused(llava):
    model, _ = llava
    with pytest.raises(Refused, match="keep must be at least"):
        Way("tome_vit", True, {"keep": 1}).attached(model)
