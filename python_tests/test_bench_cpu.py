"""What the CPU kernels are held to: every line can be measured, and says what came out."""

import json

import pytest

from bench import cpu
from bench.gpu import tokens
from restore_ext import merge_tokens
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
    file = tmp_path / "rows.json"
    assert cpu.main(["--seconds", "0", "--json", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith(f"| {verdict}") and said[2].startswith(status)
    content = json.loads(file.read_text())
    (row,) = content["rows"]
    assert row["ratio"] > 0 and row["low"] <= row["ratio"] <= row["high"]
    assert row["peer_us"] > 0 and row["us"] > 0 and content["made"]["level"] in said[0]


def test_an_answer_that_is_wrong_is_not_timed():
    wrong = lambda **given: tuple(t + 1 for t in merge_tokens(**given))  # noqa: E731
    with pytest.raises(SystemExit, match="restore_ext is wrong"):
        a_line(ours=wrong).measure(0)
