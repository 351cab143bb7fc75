"""What the GPU proof measures, without a GPU: how a bench times, what is right, and the tables."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import harness, machine, rows
from bench.gpu import attention, collect, table
from bench.harness import Gpu
from bench.provider import OURS, Missing, Peer
from restore_ext import calibrated_attention
from restore_ext.testing.attention import AttentionCase, truth
from restore_ext.testing.tokens import TokenCase

ROOT = Path(__file__).parent.parent


def run_bench(monkeypatch, capsys, providers, *arguments, cases=1):
    """The exit status and the output of a bench of toy providers: x -> x + 1."""

    def check(out, x):
        assert torch.equal(out, x + 1), "not one more"

    class Case(TokenCase):
        def arguments(self, device, dtype):
            return {"x": self.x(device, dtype)}

    gpu = Gpu([], [Case(N=3 + n, C=2) for n in range(cases)])
    monkeypatch.setattr(sys, "argv", ["bench", "--rehearse", *arguments])
    with pytest.raises(SystemExit) as stop:
        harness.main("toy", [], providers, check, gpu=gpu)
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


def test_a_bench_goes_on_where_ours_fails(monkeypatch, capsys, tmp_path):
    def broken(x):
        raise RuntimeError("out of bounds")

    results = ["--keep", "--results", str(tmp_path)]
    code, said = run_bench(monkeypatch, capsys, {"plain": one_more, OURS: broken}, *results)
    assert code == 1
    (file,) = tmp_path.glob("*.csv")
    kept = rows.read(file)
    assert [r["note"] for r in kept if r["provider"] == OURS] == [
        "failed: RuntimeError: out of bounds"
    ]
    assert {r["how"] for r in kept if r["provider"] == "plain"} == {"call", "loop", "graph"}
    code, said = run_bench(
        monkeypatch, capsys, {"plain": one_more, OURS: broken}, *results, "--resume"
    )
    assert code == 0 and "plain" not in said, "it was measured, and is not in the way"

    calls = []

    def late(x):  # fails while it is timed
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("later")
        return x + 1

    code, said = run_bench(monkeypatch, capsys, {"plain": one_more, OURS: late})
    assert code == 1 and "failed: RuntimeError: later" in said


def test_nothing_more_is_measured_on_a_device_that_is_lost(monkeypatch, capsys, tmp_path):
    def deadly(x):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(harness.clock, "lost", lambda device: True)
    results = ["--keep", "--results", str(tmp_path)]
    providers = {"plain": one_more, "deadly": deadly, OURS: one_more}
    code, said = run_bench(monkeypatch, capsys, providers, *results, cases=2)
    assert code == 1 and said.count("NOT REACHED toy") == 1
    (file,) = tmp_path.glob("*.csv")
    assert [r["provider"] for r in rows.read(file)] == ["deadly"]
    monkeypatch.undo()
    code, said = run_bench(
        monkeypatch, capsys, {"plain": one_more, OURS: one_more}, *results, "--resume", cases=2
    )
    assert code == 0 and "N=4" in said and "N=3" not in said


def test_what_a_provider_says_of_itself_is_in_its_rows_and_in_the_table(
    monkeypatch, capsys, tmp_path
):
    def by(given):
        return f"by kernel {given['x'].shape[1]}"

    providers = {"plain": one_more, OURS: Peer(lambda x: lambda: one_more(x), says=by)}
    results = ["--keep", "--results", str(tmp_path)]
    assert run_bench(monkeypatch, capsys, providers, *results)[0] == 0
    (file,) = tmp_path.glob("*.csv")
    kept = rows.read(file)
    assert {r["note"] for r in kept if r["provider"] == OURS} == {"by kernel 3"}
    text = "\n".join(table.of_gpu("Some GPU", kept))
    assert "us by kernel" not in text and " by kernel 3 | plain" in text and "half" not in text


def test_the_kernel_that_a_prompt_is_for_is_asked_for(monkeypatch):
    given = AttentionCase(D=64).arguments()
    assert attention.chosen(given) == ""

    def taken_by(*names):
        def call(**given):
            if os.environ["RESTORE_EXT_ATTENTION"] not in names:
                raise RuntimeError("does not take this")

        monkeypatch.setattr(attention, "calibrated_attention", call)
        return attention.chosen({"query": SimpleNamespace(is_cuda=True)})

    assert taken_by("hopper", "prefill") == "by hopper"
    assert taken_by("prefill") == "by prefill"
    assert taken_by() == "by plain"


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
    (folder / "golden").mkdir()
    (folder / "golden/Some_GPU.npz").write_bytes(b"said")
    for _ in range(2):
        collect.collect(folder, results, tmp_path / "emulator")
    assert (tmp_path / "emulator/Some_GPU.npz").read_bytes() == b"said"
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
