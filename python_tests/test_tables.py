"""One command writes every table of the README and the docs, and the pages are what it writes."""

import json
import re
import shutil

import pytest

from bench import demo, measured, tables
from bench.machine import ROOT
from restore_ext.bench.table import read_csv
from restore_ext.methods import list_methods


def ended(*arguments):
    with pytest.raises(SystemExit) as stop:
        tables.main(arguments)
    return stop.value.code


def test_the_pages_are_what_the_command_writes(capsys):
    assert ended("--check") == 0, capsys.readouterr().out + "run python -m bench.tables"


def test_a_stale_page_is_found_and_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    pages = ("docs/methods.md", "docs/families.md", "README.md")
    for name in pages:
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", [t for t in tables.TABLES if t.page in pages])
    methods = tmp_path / "docs/methods.md"
    right = methods.read_text()
    methods.write_text(right.replace("| `vtw` |", "| `vwt` |"))
    (tmp_path / "docs/families.md").write_text("old")
    assert ended("--check") == 1 and "`vwt`" in methods.read_text()
    assert ended() == 0 and methods.read_text() == right
    assert (tmp_path / "docs/families.md").read_text() == (ROOT / "docs/families.md").read_text()
    said = capsys.readouterr().out
    assert "docs/methods.md is not what its tables say" in said and "README" not in said
    assert ended("--check") == 0
    assert all(f"| `{name}` |" in right for name in list_methods())


def test_a_table_stands_between_its_markers():
    page = "above\n<!-- a:begin -->\nold\n<!-- a:end -->\nbelow\n"
    wanted = "above\n<!-- a:begin -->\nnew\n<!-- a:end -->\nbelow\n"
    assert tables.replaced(page, "a", "new") == wanted == tables.replaced(wanted, "a", "new")
    for wrong in ("none", page + page, page.replace("a:end", "b:end")):
        with pytest.raises(ValueError, match="once each"):
            tables.replaced(wrong, "a", "new")


def test_every_marker_of_every_page_has_its_table():
    known = {(table.page, table.name) for table in tables.TABLES if table.name}
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for mark in re.findall(r"<!-- ([\w-]+):begin -->", page.read_text()):
            assert (str(page.relative_to(ROOT)), mark) in known


def test_the_demo_is_what_was_kept(tmp_path):
    kept = json.loads(demo.RESULT.read_text())
    kept["printed"] = "what it said\n"
    kept["made"] |= {"threads": "3", "commit": "abc1234"}
    (tmp_path / "demo.json").write_text(json.dumps(kept))
    text = demo.block(tmp_path / "demo.json")
    assert text.startswith(f"```sh\n$ {kept['command']}\n```\n```text output")
    assert "\nwhat it said\n```\n" in text
    assert "Medians on 3 cores of" in text and "commit abc1234" in text


def test_measured_pages_have_every_row_and_say_on_what():
    for name, rows in (("methods-pocket", "pocket/methods"), ("model", "pocket/model")):
        kept = read_csv(measured.RESULTS / f"{rows}.csv")
        text = measured.TABLES[name]()
        assert all(row["ttft_ms" if name == "model" else "prefill_ms"] in text for row in kept)
        assert kept[0]["machine"] in text and kept[0]["commit"] in text
        assert all(row["commit"] and row["torch"] and row["when"] for row in kept)
    kept = read_csv(measured.RESULTS / "pocket/methods.csv")
    assert {row["way"].split()[0] for row in kept} == {"all", *list_methods()}


def test_the_lines_of_the_cpu_have_their_verdict(monkeypatch, tmp_path):
    row = {"op": "o", "case": "c", "dtype": "float32", "peer": "p", "low": 1.4, "high": 2.0}
    wanted = [(1.5, 1.4, 2.5, "bar"), (1.5, 1.6, None, "below"), (3.0, 2, 3.0, "goal")]
    wanted += [(1.5, None, None, "")]
    rows = [row | {"ratio": r, "bar": bar, "goal": goal} for r, bar, goal, _ in wanted]
    made = dict.fromkeys(("command", "machine", "level", "torch", "commit"), "known")
    (tmp_path / "cpu_avx2.json").write_text(json.dumps({"made": made, "rows": rows}))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    lines = measured.cpu_lines().splitlines()
    for line, (ratio, bar, goal, verdict) in zip(lines[2:6], wanted, strict=True):
        cells = [cell.strip() for cell in line.split("|")[5:9]]
        said = ["" if x is None else str(x) for x in (bar, goal)]
        assert cells == [f"{ratio} (1.4 to 2.0)", *said, verdict]
    assert lines[-1] == "`known`: known, level known, torch known, commit known."


def test_the_guard_is_a_line_for_each_number_of_tokens(monkeypatch, tmp_path):
    (tmp_path / "m").mkdir()
    spread = "{0}_p20,{0}_p80"
    names = f"before,way,tokens,prefill_ms,{spread.format('prefill_ms')},speedup,"
    made = "command,model,machine,threads,clock,torch,transformers,commit,when"
    facts = "c,m,cpu,1,thread,2,5,abc,today"
    lines = [
        f"{names}{spread.format('speedup')},{made}",
        f"9,all tokens,9,5.0,4.0,6.0,,,,{facts}",
        f"9,uniform + RESTORE,1,6.0,5.0,7.0,0.90,0.80,0.95,{facts}",
        f"16,all tokens,16,8.0,7.0,9.0,,,,{facts}",
        f"16,uniform + RESTORE,2,4.0,3.0,5.0,2.00,1.90,2.10,{facts}",
    ]
    (tmp_path / "m/guard.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    monkeypatch.setattr(measured, "GUARDS", ("m",))
    assert measured.guards().splitlines()[2:5] == [
        "| 9 | 1 | 5.0 (4.0 to 6.0) | 0.90 (0.80 to 0.95) |",
        "| 16 | 2 | 8.0 (7.0 to 9.0) | 2.00 (1.90 to 2.10) |",
        "| pays from |  |  | 16 |",
    ]
