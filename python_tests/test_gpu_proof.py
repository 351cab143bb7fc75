"""The GPU proof without a GPU: it is rehearsed, interrupted, collected, and made into tables."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import harness, machine, rows
from bench.gpu import attention, build, collect, proof, table
from bench.gpu.stages import OPERATORS, STAGES, Context, Stage, lacking
from bench.harness import Gpu
from bench.provider import OURS, Missing, Peer
from restore_ext import calibrated_attention
from restore_ext.testing.attention import AttentionCase, truth
from restore_ext.testing.tokens import TokenCase

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A folder after all stages ran on tiny problems, on the CPU."""
    out = tmp_path_factory.mktemp("proof")
    kept = sorted((ROOT / "bench/results").iterdir())
    run = subprocess.run(
        [ROOT / "bench/gpu_proof.sh", "--dry-run", "--out", out],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted((ROOT / "bench/results").iterdir()) == kept, "a rehearsal is no result"
    return out


def test_every_stage_rehearses(rehearsal):
    for stage in STAGES:
        record = json.loads((rehearsal / f"{stage.name}.json").read_text())
        wanted = "missing" if lacking(stage, rehearse=True) else "ok"
        assert record["status"] == wanted and record["dry_run"], record
        assert record["commit"] and record["source"] and record["torch"] == torch.__version__
        if wanted == "ok":
            assert (rehearsal / f"{stage.name}.log").stat().st_size and not record["not_reached"]


def test_a_rehearsal_times_every_provider_or_says_why_not(rehearsal):
    (file,) = (rehearsal / "results").glob("*.csv")
    measured = rows.read(file)
    assert list(measured[0]) == rows.NAMES
    assert {r["op"] for r in measured} == {
        *OPERATORS,
        "calibrated_attention_decode",
        "model",
        "ceiling",
    }
    ways = {("call", "cold"), ("loop", "warm"), ("graph", "warm"), ("graph", "cold")}
    for op in OPERATORS:
        of_op = [r for r in measured if r["op"] == op]
        assert {(r["how"], r["cache"]) for r in of_op if r["provider"] == OURS} == ways
        assert all(r["us"] or r["note"] for r in of_op)
        assert not any(r["note"].startswith(("failed", "wrong")) for r in of_op)
    beside = {r["provider"]: r for r in measured if r["op"] == "calibrated_attention"}
    for name in ("SDPA cuDNN, no bias", "SDPA FA2, no bias", "FlashAttention-3, no bias"):
        assert beside[name]["note"] == "missing: needs a GPU"
    for name in ("FlexAttention", "released code's layer", OURS):
        assert 0 < float(beside[name]["error"]) < 0.02
    record = json.loads((rehearsal / "bench-attention.json").read_text())
    assert "SDPA FA2, no bias: missing: needs a GPU" in record["peers"]


def staged(command, **more):
    return Stage("trial", "", lambda c: [[sys.executable, "-c", command]], **more)


def test_a_stage_that_passed_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "facts", lambda rehearse: {"commit": machine.commit()})
    ran = []
    stage = Stage("trial", "", lambda c: ran.append(1) or [])
    monkeypatch.setattr(proof, "run_all", lambda s, c: (s.commands(c), {"status": "ok"})[1])
    for commit, force, count in (("abc", False, 1), ("abc", False, 1), ("abc", True, 2)):
        monkeypatch.setattr(machine, "commit", lambda commit=commit: commit)
        assert proof.prove(stage, tmp_path, True, force)["status"] == "ok"
        assert len(ran) == count
    monkeypatch.setattr(machine, "commit", lambda: "def")
    proof.prove(stage, tmp_path, True)
    assert len(ran) == 3


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("print('fine')", "ok"),
        ("raise SystemExit(75)", "partial"),
        ("raise SystemExit(3)", "failed"),
        ("undefined", "failed"),
        ("import time; time.sleep(60)", "timeout"),
    ],
)
@pytest.mark.parametrize("rehearse", [False, True])
def test_how_a_stage_ends_is_written_down(command, status, rehearse, tmp_path, monkeypatch):
    file = tmp_path / "trial.py"
    file.write_text(command)
    stage = Stage("trial", "", lambda c: [[sys.executable, str(file)]])
    start = time.time()
    seconds = 2.5 if status == "timeout" else 60
    record = proof.run_all(stage, Context(tmp_path, rehearse, False, start + seconds))
    assert record["status"] == status and time.time() - start < 30
    assert "exit" in (tmp_path / "trial.log").read_text()


def test_the_worst_of_several_commands_counts_and_all_run(tmp_path):
    codes = [0, 75, 2, 0]
    stage = Stage(
        "trial", "", lambda c: [[sys.executable, "-c", f"raise SystemExit({x})"] for x in codes]
    )
    record = proof.run_all(stage, Context(tmp_path, False, False, time.time() + 60))
    assert record["exits"] == codes and record["status"] == "failed"


def test_what_a_stage_needs_and_is_not_there_is_said(tmp_path):
    stage = staged("", needs=("a_module_of_nobody", "tools/nowhere.py"))
    record = proof.prove(stage, tmp_path, rehearse=True)
    assert record["status"] == "missing"
    assert record["note"] == "not on this machine: a_module_of_nobody, tools/nowhere.py"


def run_bench(monkeypatch, capsys, providers, *arguments):
    """The exit status and the output of a bench of toy providers: x -> x + 1."""

    def check(out, x):
        assert torch.equal(out, x + 1), "not one more"

    class Case(TokenCase):
        def arguments(self, device, dtype):
            return {"x": self.x(device, dtype)}

    monkeypatch.setattr(sys, "argv", ["bench", "--rehearse", *arguments])
    with pytest.raises(SystemExit) as stop:
        harness.main("toy", [], providers, check, gpu=Gpu([], [Case(N=3, C=2)]))
    return stop.value.code, capsys.readouterr().out


def absent(**given):
    raise Missing("no such library")


def one_more(x):
    return x + 1


def test_a_bench_times_nothing_wrong_and_drops_nobody(monkeypatch, capsys, tmp_path):
    providers = {
        "plain": one_more,
        "liar": lambda x: x,
        "rounder": Peer(lambda x: lambda: x, exact=False),
        "stranger": Peer(absent),
        OURS: one_more,
    }
    results = ["--keep", "--results", str(tmp_path)]
    code, said = run_bench(monkeypatch, capsys, providers, *results)
    assert code == 1
    (file,) = tmp_path.glob("*.csv")
    kept = rows.read(file)
    assert [r["note"] for r in kept if r["provider"] == "liar"] == ["wrong: not one more"]
    assert [r["note"] for r in kept if r["provider"] == "stranger"] == ["missing: no such library"]
    assert {r["note"] for r in kept if r["provider"] == "rounder"} == {
        "half precision: not one more"
    }
    assert all(r["us"] for r in kept if r["provider"] in ("plain", "rounder", OURS))
    assert next(r for r in kept if r["provider"] == "plain")["speedup"] == "1.0"

    del providers["liar"]
    code, said = run_bench(monkeypatch, capsys, providers, *results, "--resume")
    assert code == 0 and "plain" not in said, "it was measured before"
    code, said = run_bench(monkeypatch, capsys, providers, "--until", "0")
    assert code == harness.PARTIAL and "NOT REACHED toy" in said


def test_the_check_of_attention_sees_what_matters():
    case = AttentionCase(B=2, Hq=32, Hkv=2, Lq=140, Lk=140, D=32)
    given = case.arguments("cpu", torch.bfloat16)
    out = calibrated_attention(**given)
    assert attention.check(out, **given) < 5e-3
    for name in ("log_size", "decay"):
        with pytest.raises(AssertionError):
            attention.check(calibrated_attention(**given | {name: None}), **given)
    swapped = given | {"query": given["query"].roll(1, 1)}
    shifted = given | {"query_position": given["query_position"] + 9}
    spoiled = out.clone()
    spoiled[0, 3, -1] = 0.0  # the last query of a head
    others = [calibrated_attention(**g) for g in (shifted, swapped)]
    for wrong in (*others, spoiled, out.roll(1, 2), out * 1.03):
        with pytest.raises(AssertionError):
            attention.check(wrong, **given)
    with pytest.raises(AssertionError):
        attention.check(torch.full_like(out, float("nan")), **given)


@pytest.mark.parametrize("causal", [True, False])
def test_a_part_of_the_queries_is_the_whole_problem_for_them(causal):
    for case in (AttentionCase(B=3, Lq=150, Lk=170, D=32), AttentionCase(positions=None, D=32)):
        given = case.arguments() | {"causal": causal}
        rows_, batch = attention.some(given)
        few = truth(attention.part(given, rows_, batch))
        whole = truth(given)
        torch.testing.assert_close(few[0], whole[0][batch][:, :, rows_])


def gpu_row(**more):
    row = dict.fromkeys(rows.NAMES, "") | {"op": "merge_tokens", "case": "N=9", "dtype": "bfloat16"}
    row |= {"how": "graph", "cache": "warm", "driver": "1.2", "commit": "abc", "source": "s"}
    return row | more


def test_results_are_collected_once_and_rehearsals_never(tmp_path):
    folder, results = tmp_path / "out", tmp_path / "results"
    rows.append(folder / "results/Some_GPU.csv", [gpu_row(provider=OURS, us=2.0)])
    rows.append(folder / "results/Some_CPU.csv", [gpu_row(provider=OURS, us=2.0, driver="")])
    record = {"gpu": "Some GPU", "status": "ok", "when": "2026-01-01", "commit": "abc"}
    said = {
        "tests": record | {"stage": "tests"},
        "build": record | {"stage": "build", "status": "failed"},
        "model": record | {"stage": "model", "dry_run": True},
    }
    for name, content in said.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for _ in range(2):
        collect.collect(folder, results)
    assert [f.name for f in sorted(results.iterdir())] == ["Some_GPU.csv", "gpu_proof.json"]
    assert len(rows.read(results / "Some_GPU.csv")) == 1
    assert list(collect.passed(results)["Some GPU"]) == ["tests"]


def test_the_table_of_numbers(tmp_path):
    assert table.numbers(tmp_path).startswith("No GPU has run the CUDA kernels yet")
    rows.append(
        tmp_path / "Some_GPU.csv",
        [
            gpu_row(provider="plain torch", us=7.0, source="old"),
            gpu_row(provider="gone", us=7.0, source="old"),
            gpu_row(provider="plain torch", us=6.0),
            gpu_row(provider="released code", us=3.0, note="half precision: off"),
            gpu_row(provider="stranger", note="missing: nobody", how="", cache=""),
            gpu_row(provider=OURS, us=2.0),
            gpu_row(provider=OURS, us=9.0, how="loop"),
        ],
    )
    text = table.numbers(tmp_path)
    assert "Some GPU, driver 1.2" in text and "commit abc" in text
    assert "| graph, warm L2 | 2.0 | plain torch 3.00, released code\\* 1.50 |" in text
    assert "stranger (missing: nobody)" in text and "gone" not in text


def test_the_table_of_kernels():
    now = machine.kernels()
    lines = table.proof_table({}).splitlines()
    assert len(lines) == 2 + len(now) and all(line.count("never") == 4 for line in lines[2:])
    stem = next(iter(now))
    name = table.launched_names((ROOT / f"csrc/cuda/{stem}.cu").read_text())[0]
    ran = {"commit": "abc", "source": "s", "when": "", "kernels": now}
    stages = {
        "launches": ran
        | {"stage": "launches", "launched": [f"void restore_ext::cuda::{name}<float>"]},
        "tests-gpu": ran | {"stage": "tests-gpu"},
        "bench-reduce": ran | {"stage": "bench-reduce", "source": "other"},
    }
    line = table.proof_table({"Some GPU": stages}).splitlines()[2]
    assert line == f"| `{stem}.cu` | abc on Some GPU | gpu: abc | never | never |"
    ran["kernels"] = {stem: "other"}
    stages["launches"]["kernels"] = {stem: "other"}
    assert "abc on Some GPU, changed since" in table.proof_table({"Some GPU": stages})


def test_kernels_are_found_in_what_a_profiler_says():
    text = "__global__ void __launch_bounds__(f(2) * 3, 1) some_kernel(int a) { g(a); }"
    assert table.launched_names(text) == ["some_kernel"]
    for event in (
        "void restore_ext::cuda::some_kernel<__half>(P)",
        "_ZN11restore_ext11some_kernelIfE",
    ):
        assert table.launches([event], "some_kernel")
    for event in ("void at::some_kernel<float>()", "restore_ext::awesome_kernel<float>()"):
        assert not table.launches([event], "some_kernel")


def test_which_machine_code_runs_where():
    assert build.runs("9.0a", "9.0a") and build.runs("8.0", "8.9") and build.runs("12.0", "12.0")
    assert not build.runs("8.0", "9.0a") and not build.runs("10.0a", "10.3a")
    assert not build.runs("8.9", "8.6")
    assert build.operators() == list(dict.fromkeys(build.operators()))
    assert set(build.operators()) == set(OPERATORS)
