"""The GPU proof without a GPU: it is rehearsed, interrupted, collected, and made into tables."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import machine, rows
from bench.gpu import build, drive, problems, proof, stages
from bench.gpu.stages import OPERATORS, STAGES, Context, Stage, lacking
from bench.provider import OURS
from restore_ext import _C

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
    monkeypatch.setattr(proof, "run_all", lambda s, c, *rest: (s.commands(c), {"status": "ok"})[1])
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


def test_a_stage_goes_on_where_it_was(tmp_path, monkeypatch):
    """What passed is not run again, by any record that an interrupted run has left."""
    monkeypatch.setattr(proof, "facts", lambda rehearse: {})
    flag = tmp_path / "flag"
    codes = [
        "print('first')",
        f"import pathlib; raise SystemExit(0 if pathlib.Path({str(flag)!r}).exists() else 3)",
        "print('last')",
    ]
    stage = Stage("trial", "", lambda c: [[sys.executable, "-c", x] for x in codes])
    ran = []
    executed = proof.executed
    monkeypatch.setattr(
        proof, "executed", lambda command, *rest: ran.append(command[2]) or executed(command, *rest)
    )
    assert proof.prove(stage, tmp_path, False)["exits"] == [0, 3, 0] and ran == codes
    with monkeypatch.context() as patch:  # it dies in the second, which is yet to pass
        patch.setattr(proof, "executed", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            proof.prove(stage, tmp_path, False)
    assert json.loads((tmp_path / "trial.json").read_text())["status"] == "partial"
    flag.touch()
    ran.clear()
    record = proof.prove(stage, tmp_path, False)
    assert record["status"] == "ok" and ran == codes[1:2] and record["exits"] == [0, 0, 0]


def test_a_command_that_hangs_costs_no_other(tmp_path):
    codes = ["import time; time.sleep(60)", "pass"]
    commands = [[sys.executable, "-c", x] for x in codes]
    stage = Stage("trial", "", lambda c: commands, seconds=1)
    start = time.time()
    record = proof.run_all(stage, Context(tmp_path, False, False, start + 60))
    assert record["exits"] == [proof.TIMEOUT, 0] and record["status"] == "timeout"
    late = proof.run_all(stage, Context(tmp_path, False, False, start))
    assert late["status"] == "partial" and late["not_reached"] == [
        f"python -c {code}" for code in codes
    ]
    assert time.time() - start < 30


def test_the_name_of_a_command_says_what_it_is_in_every_run(tmp_path):
    names = [
        proof.name_of(Context(tmp_path, False, False, end).bench("decode")) for end in (100, 200)
    ]
    assert names[0] == names[1] and names[0].startswith("python -m bench.bench_decode")


def alone(script, tmp_path):
    """What a script says that begins where no library has been loaded, nor can be."""
    file, log = tmp_path / "alone.py", tmp_path / "log"
    file.write_text(
        "import sys\n"
        "sys.stdout, sys.stderr = open(1, 'w', 1), open(2, 'w', 1)\n"
        "for name in [m for m in sys.modules if m.split('.')[0] in ('restore_ext', 'bench')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['restore_ext._C'] = None\n" + script
    )
    with log.open("w") as out:
        code = proof.rehearsed([sys.executable, str(file)], {}, out.fileno(), time.time() + 60)
    return code, log.read_text()


def test_a_tree_without_a_library_builds_one_first(tmp_path):
    code, said = alone("from bench.gpu.proof import main; main(['--list'])", tmp_path)
    assert code == 0 and said.split()[0] == "build", said
    code, said = alone("from bench.gpu.proof import main; main(['--dry-run'])", tmp_path)
    assert code == 2 and "there is no library to load" in said, said
    script = """
import subprocess, torch
from bench.gpu import proof
torch.cuda.is_available = lambda: True
def build(command, **more):
    assert command[1:] == ["-m", "bench.gpu.build"], command
    del sys.modules["restore_ext._C"]
    return subprocess.CompletedProcess(command, 0)
subprocess.run = build
def prove(stage, *rest):
    print("at", stage.name)
    return dict(stage="", status="ok", seconds=0, note="")
proof.prove = prove
proof.collect = lambda *rest: None
proof.main(["--stage", "smoke"])
"""
    code, said = alone(script, tmp_path)
    assert code == 0 and "building\nat smoke" in said, said


def test_what_results_depend_on_is_the_same_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    file, library = tmp_path / "csrc/a.cu", tmp_path / "restore_ext/_C.abi3.so"
    for path in (file, library):
        path.parent.mkdir()
        path.write_text("1")
    source = machine.source.__wrapped__
    before = source()
    library.write_text("2")
    assert source() == before
    file.write_text("2")
    assert source() != before
    assert machine.library() == machine.library() and len(machine.library()) == 12


def test_every_test_of_an_operator_runs_in_one_stage():
    assert stages.test_files("calibrated_attention") == [
        "python_tests/test_calibrated_attention.py",
        "python_tests/test_calibrated_attention_kernels.py",
    ]
    assert "python_tests/test_calibrated_attention_paged_refusals.py" in stages.test_files(
        "calibrated_attention_paged"
    )
    found = [f for op in OPERATORS for f in stages.test_files(op)]
    assert len(found) == len(set(found)) and all(stages.test_files(op) for op in OPERATORS)


def test_every_operator_has_a_command_of_its_own(tmp_path):
    c = Context(tmp_path, False, False, 0)
    by_name = {stage.name: stage.commands(c) for stage in STAGES}
    for name in ("sanitizer-short", "sanitizer-racecheck"):
        asked = [command[command.index("--op") + 1] for command in by_name[name]]
        assert asked == list(OPERATORS)
    kernels = [" ".join(command).partition("--op ")[2] for command in by_name["smoke"]]
    assert {f"calibrated_attention --kernel {k}" for k in stages.KERNELS} < set(kernels)
    assert len(by_name["tests-tokens"]) == 6 and len(by_name["tests-attention"]) == 3
    names = [stage.name for stage in STAGES]
    assert names[:4] == ["build", "smoke", "tests-tokens", "tests-attention"]
    assert names.index("sanitizer-short") < names.index("bench-attention") < names.index("golden")
    for stage in STAGES:
        assert stage.minutes <= 9 and stage.seconds <= 9 * 60


def test_the_toolkits_sanitizer_is_found_without_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(stages, "CUDA", tmp_path / "cuda")
    assert not stages.there(stages.SANITIZER, rehearse=False)
    program = tmp_path / "cuda/bin/compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert stages.there(stages.SANITIZER, rehearse=False)
    c = Context(tmp_path, False, False, 0)
    assert stages.sanitizer("memcheck")(c)[0][0] == str(program)


def test_a_kernel_is_forced_for_one_call_and_left_out_where_it_does_not_take_a_problem(
    monkeypatch, capsys
):
    seen = []

    def answer(**given):
        seen.append(os.environ.get("RESTORE_EXT_ATTENTION"))
        if seen[-1] == "hopper":
            raise RuntimeError("RESTORE_EXT_ATTENTION=hopper does not take this")
        return given["query"]

    monkeypatch.setattr(problems.ops, "calibrated_attention", answer)
    some = [p for p in problems.BY_KERNEL if p.case == problems.ATTENTION[0]]
    assert drive.drive(some, "cpu", [torch.bfloat16])
    assert set(seen) == {None, *stages.KERNELS} and "RESTORE_EXT_ATTENTION" not in os.environ
    assert capsys.readouterr().out.count("is not for it") == 1


def test_what_a_stage_needs_and_is_not_there_is_said(tmp_path):
    stage = staged("", needs=("a_module_of_nobody", "tools/nowhere.py"))
    record = proof.prove(stage, tmp_path, rehearse=True)
    assert record["status"] == "missing"
    assert record["note"] == "not on this machine: a_module_of_nobody, tools/nowhere.py"


def test_which_machine_code_runs_where():
    for built, arch in [
        ("9.0a", "9.0a"),
        ("9.0a+PTX", "9.0a"),
        ("8.0", "8.9"),
        ("8.0+PTX", "8.6"),
        ("10.0", "10.3a"),
        ("12.0", "12.1"),
    ]:
        assert build.is_for(built, arch)
    for built, arch in [
        ("9.0", "9.0a"),  # without the kernels for Hopper
        ("8.0+PTX", "9.0a"),  # it runs, compiled by the driver, and without them
        ("8.0+PTX", "12.0"),
        ("8.0", "9.0a"),
        ("10.0a", "10.3a"),
        ("8.9", "8.6"),
    ]:
        assert not build.is_for(built, arch)


def test_what_a_library_lacks_is_said(monkeypatch):
    monkeypatch.setattr(_C, "cuda_archs", "8.0+PTX 9.0a")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: has(op, "CPU")
    )
    assert build.lack("9.0a") == build.lack("8.6") == build.lack("") == ""
    assert build.lack("12.0") == "the library was built for 8.0+PTX 9.0a, not for 12.0"
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: "merge" not in op
    )
    assert build.lack("9.0a") == "no CUDA kernel for merge_tokens"


def test_every_operator_is_proven():
    assert build.operators() == list(dict.fromkeys(build.operators()))
    assert set(build.operators()) == set(OPERATORS)
