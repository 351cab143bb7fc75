"""What the CPU kernels are held to: every line can be measured, and says what came out."""

import json
from dataclasses import replace

import pytest
import torch

from bench import cpu, cpu_model
from bench.gpu import tokens
from restore_ext import merge_tokens
from restore_ext.bench import random_llava
from restore_ext.bench.plain import merged_with
from restore_ext.testing.tokens import MergeCase, check_merge_tokens


def test_the_lines_are_those_that_were_promised():
    lines = list(cpu.goals())
    assert len({(g.op, str(g.case), g.dtype, g.peer) for g in lines}) == len(lines) == 40
    assert all(g.bar < g.goal for g in lines) and {g.dtype for g in lines} == set(cpu.BOTH)


def a_line(ours=merge_tokens, bar=0.0, goal=1e9):
    peer = merged_with(tokens.by_index_add)
    case = MergeCase(N=40, M=5, C=16)
    return cpu.Goal("merge", case, "float32", "a peer", peer, ours, check_merge_tokens, bar, goal)


@pytest.mark.parametrize(
    ("bar", "goal", "verdict", "status"),
    [(0, 1e9, "bar", "1 of 1"), (0, 0, "goal", "1 of 1"), (1e9, 2e9, "below", "0 of 1")],
)
def test_a_line_is_measured_kept_and_judged(
    tmp_path, monkeypatch, capsys, bar, goal, verdict, status
):
    monkeypatch.setattr(cpu, "goals", lambda: iter([a_line(bar=bar, goal=goal)]))
    monkeypatch.setattr(cpu_model, "lines", lambda: iter(()))
    file = tmp_path / "rows.json"
    assert cpu.main(["--seconds", "0", "--json", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith(f"| {verdict}") and said[2].startswith(status)
    content = json.loads(file.read_text())
    (row,) = content["rows"]
    assert row["ratio"] > 0 and row["low"] <= row["ratio"] <= row["high"]
    assert row["peer_us"] > 0 and row["us"] > 0 and content["made"]["level"] in said[0]


def tiny():
    shape = random_llava.Shape()
    return random_llava.build(shape, "cpu", torch.float32), random_llava.prompt(
        shape, 1, "cpu", torch.float32
    )


def test_a_whole_model_has_its_lines(monkeypatch, capsys):
    lines = list(cpu_model.lines())
    assert len({(g.op, g.case, g.peer) for g in lines}) == len(lines) == 12
    assert [g.bar for g in lines if g.op == "reduction"] == [None, None, 20, 20]
    monkeypatch.setattr(cpu, "goals", lambda: iter(()))
    monkeypatch.setattr(cpu_model, "KEEP", 16)
    few = [replace(g, subject=tiny, method="divprune") for g in lines[:3]]
    monkeypatch.setattr(cpu_model, "lines", lambda: few)
    assert cpu.main(["--seconds", "0"]) == 0
    assert "0 of 0 lines at their bar or above" in capsys.readouterr().out
    whole, rest, share = (g.measure(0) for g in few)
    assert whole["us"] > rest["us"] > share["us"] > 0 and whole["peer_us"] > rest["peer_us"]
    assert share["peer_us"] == whole["us"] and share["ratio"] > 1
    parts = cpu_model.rounds(tiny, "divprune", 0)
    assert all(len(seen) == 2 for seen in parts.values()) and len(parts) == 5


def test_an_answer_that_is_wrong_is_not_timed():
    wrong = lambda **given: tuple(t + 1 for t in merge_tokens(**given))  # noqa: E731
    with pytest.raises(SystemExit, match="restore_ext is wrong"):
        a_line(ours=wrong).measure(0)
