"""Runs the stages of the GPU proof, each in its own processes, and writes down how they went.

    bench/gpu_proof.sh [--stage NAME ...] [--dry-run] [--out DIR] [--force]
    bench/gpu_proof.sh --collect DIR      results of another machine, into bench/results

DIR/<stage>.json says how a stage went, DIR/<stage>.log what it printed, DIR/results/<machine>.csv
what was measured. A stage that passed with these sources is not run again, one that was cut short
goes on where it was. What passed on a GPU goes to bench/results, too; a dry run leaves that alone.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.gpu.collect import RESULTS, collect
from bench.gpu.stages import LAUNCHED, STAGES, Command, Context, Stage, lacking
from bench.harness import PARTIAL

TIMEOUT = 124
PEER = re.compile(r" b?float\d+  (\S.*?) +((?:missing|failed|wrong): .*)")
WORST = ("ok", "missing", "partial", "failed", "timeout")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench/gpu_proof.sh", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage", nargs="+", default=[""], help="by name, or how names begin")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: finds typos")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_proof"), metavar="DIR")
    parser.add_argument("--force", action="store_true", help="also what passed already")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="run nothing, collect from DIR")
    parser.add_argument("--list", action="store_true", help="the stages, and no more")
    a = parser.parse_args(argv)
    if a.list:
        print("\n".join(f"{s.name:<20} {s.says}" for s in STAGES))
        return
    if a.collect is not None:
        collect(a.collect, RESULTS)
        return
    chosen = [s for s in STAGES if any(s.name.startswith(wanted) for wanted in a.stage)]
    if not chosen:
        parser.error(f"no stage begins with {', '.join(a.stage)}; --list names them")
    if not a.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run rehearses without one")
    out = a.out.resolve()
    (out / "results").mkdir(parents=True, exist_ok=True)
    if a.dry_run:  # what all rehearsals need, loaded once
        importlib.import_module("bench.gpu.attention")
        importlib.import_module("torch._dynamo")
    records = []
    for stage in chosen:
        records.append(prove(stage, out, a.dry_run, a.force))
        if not a.dry_run:
            collect(out, RESULTS)
    print("\n".join(summary(records)))
    sys.exit(1 if any(r["status"] in ("failed", "timeout") for r in records) else 0)


def prove(stage: Stage, out: Path, rehearse: bool, force: bool = False) -> dict[str, Any]:
    file = out / f"{stage.name}.json"
    made = facts(rehearse)
    before = json.loads(file.read_text()) if file.is_file() else {}
    if not force and before.get("status") == "ok" and made.items() <= before.items():
        print(f"{stage.name}: passed before with these sources", flush=True)
        return before
    print(f"{stage.name}: {stage.says}", flush=True)
    start = time.time()
    record = {"stage": stage.name, "status": "missing", "note": lacking(stage, rehearse), **made}
    if not record["note"]:
        record |= run_all(stage, Context(out, rehearse, force, start + 60 * stage.minutes))
    if stage.name == "build":
        record |= facts(rehearse)  # it may have made another library
    if stage.name == "launches" and (names := out / LAUNCHED).is_file():
        record["launched"] = names.read_text().splitlines()
    when = datetime.fromtimestamp(start, timezone.utc)
    record |= {"when": when.isoformat(timespec="seconds"), "seconds": round(time.time() - start, 1)}
    replace(file, json.dumps(record, indent=1) + "\n")
    print(f"{stage.name}: {record['status']} after {record['seconds']} s", flush=True)
    return record


def run_all(stage: Stage, c: Context) -> dict[str, Any]:
    """Every command of a stage, whatever the others came to; the worst of them counts."""
    log = c.out / f"{stage.name}.log"
    exits, ran = [], []
    with log.open("w") as file:
        for command in stage.commands(c):
            ran.append(
                " ".join(["python", *command[1:]] if command[0] == sys.executable else command)
            )
            file.write(f"$ {ran[-1]}\n")
            file.flush()
            run = rehearsed if c.rehearse else executed
            exits.append(run(command, stage.environment, file.fileno(), c.end))
            file.write(f"\nexit {exits[-1]}\n")
            file.flush()
    status = max((status_of(code) for code in exits), key=WORST.index)
    text = log.read_text(errors="replace")
    if status in ("failed", "timeout"):
        print("\n".join(f"  | {line}" for line in text.splitlines()[-25:]), flush=True)
    return {
        "status": status,
        "exits": exits,
        "clocks": "" if c.rehearse else machine.clocks(),
        "commands": ran,
        "peers": sorted({f"{name}: {why}" for name, why in PEER.findall(text)}),
        "not_reached": re.findall(r"^NOT REACHED (.*)$", text, re.MULTILINE),
    }


def status_of(code: int) -> str:
    return {0: "ok", PARTIAL: "partial", TIMEOUT: "timeout"}.get(code, "failed")


def executed(command: Command, environment: dict[str, str], log: int, end: float) -> int:
    """Its exit status; past the end, the command and all that it started are stopped."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=machine.ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        start_new_session=True,
    )
    try:
        return process.wait(max(end - time.time(), 1))
    except subprocess.TimeoutExpired:
        return TIMEOUT
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rehearsed(command: Command, environment: dict[str, str], log: int, end: float) -> int:
    """The same in a fork of this process, which has torch loaded already."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(environment)
            os.chdir(machine.ROOT)
            code = run_here(command[1:])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMEOUT


def run_here(arguments: list[str]) -> int:
    """What `python ARGUMENTS` would do; returns its exit status."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def facts(rehearse: bool) -> dict[str, Any]:
    """What a result holds for; another of these, and a stage is run again."""
    machine.source.cache_clear()
    return {
        "gpu": "" if rehearse else torch.cuda.get_device_name(),
        "driver": "" if rehearse else machine.driver(),
        "torch": torch.__version__,
        "commit": machine.commit(),
        "source": machine.source(),
        "kernels": machine.kernels(),
        "dry_run": rehearse,
    }


def replace(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


def summary(records: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    for r in records:
        yield f"{r['stage']:<20} {r['status']:<8} {r['seconds']:>7} s  {r['note']}".rstrip()
        for name in r.get("peers", []):
            yield f"{'':<20} {name}"
        for name in r.get("not_reached", []):
            yield f"{'':<20} not reached: {name}"


if __name__ == "__main__":
    main()
