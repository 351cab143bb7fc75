"""Runs the stages of the GPU proof, each in its own processes, and writes down how they went.

    bench/gpu_proof.sh [--stage NAME ...] [--dry-run] [--out DIR] [--force]
    bench/gpu_proof.sh --collect DIR      results of another machine, into bench/results

DIR/<stage>.json says how a stage went, DIR/<stage>.log what it printed, DIR/results/<machine>.csv
what was measured. What passed with these sources is not run again, a stage or a command of it; one
that was cut short goes on where it was. What passed on a GPU goes to bench/results, too; a dry run
leaves that alone. A tree without a library is built first.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import torch

# Nothing that loads the library, which may have to be built: bench.machine does.
from bench.gpu.collect import RESULTS, collect
from bench.gpu.stages import LAUNCHED, ROOT, STAGES, Command, Context, Stage, lacking
from bench.provider import PARTIAL

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
    if why := no_library():
        if a.dry_run:
            parser.error(f"{why}; python setup.py build_ext --inplace builds it")
        print(f"{why}: building", flush=True)
        built = subprocess.run([sys.executable, "-m", "bench.gpu.build"], cwd=ROOT)
        if built.returncode or no_library():
            sys.exit("the library could not be built")
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


def machine() -> ModuleType:
    """bench.machine, which loads the library."""
    return importlib.import_module("bench.machine")


def no_library() -> str:
    """Why the package cannot be imported; "" if it can."""
    importlib.invalidate_caches()
    try:
        importlib.import_module("restore_ext")
    except ImportError as error:
        return f"there is no library to load ({error})"
    return ""


def prove(stage: Stage, out: Path, rehearse: bool, force: bool = False) -> dict[str, Any]:
    file = out / f"{stage.name}.json"
    made = facts(rehearse)
    before = json.loads(file.read_text()) if file.is_file() else {}
    if force or not made.items() <= before.items():
        before = {}
    if before.get("status") == "ok":
        print(f"{stage.name}: passed before with these sources", flush=True)
        return before
    print(f"{stage.name}: {stage.says}", flush=True)
    start = time.time()
    when = datetime.fromtimestamp(start, timezone.utc).isoformat(timespec="seconds")
    note = lacking(stage, rehearse)
    record = {"stage": stage.name, "status": "missing", "note": note, "when": when, **made}

    def keep(more: dict[str, Any]) -> None:
        record.update(more, seconds=round(time.time() - start, 1))
        replace(file, json.dumps(record, indent=1) + "\n")

    if not note:
        context = Context(out, rehearse, force, start + 60 * stage.minutes)
        keep(run_all(stage, context, before, keep))
    record["library"] = machine().library()
    if stage.name == "launches" and (names := out / LAUNCHED).is_file():
        record["launched"] = names.read_text().splitlines()
    keep({})
    print(f"{stage.name}: {record['status']} after {record['seconds']} s", flush=True)
    return record


def run_all(
    stage: Stage,
    c: Context,
    before: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Every command of a stage, whatever the others came to; the worst of them counts.

    What passed `before`, by the record of an earlier run, is not run again. The record so far is
    given to `keep` after every command: who stops the stage loses the one it was at.
    """
    before = before or {}
    passed = set(before.get("passed", ()))
    log = c.out / f"{stage.name}.log"
    record: dict[str, Any] = {"commands": [], "exits": [], "not_reached": []}
    record["status"] = "ok"
    seen = set(before.get("peers", ()))
    commands = stage.commands(c)
    with log.open("a+" if passed else "w+") as file:
        for at, command in enumerate(commands, 1):
            name = name_of(command)
            begin = file.seek(0, os.SEEK_END)
            code = 0 if name in passed else run_one(command, stage, c, file)
            text = read_from(log, begin)
            seen |= {f"{peer}: {why}" for peer, why in PEER.findall(text)}
            record["commands"].append(name)
            record["exits"].append(code)
            passed |= {name} if code == 0 else set()
            record["passed"] = sorted(passed)
            record["not_reached"] += re.findall(r"^NOT REACHED (.*)$", text, re.MULTILINE)
            record["peers"] = sorted(seen)
            worst = max(map(status_of, record["exits"]), key=WORST.index)
            record["status"] = max(
                worst, "partial" if at < len(commands) else "ok", key=WORST.index
            )
            if code and status_of(code) != "partial":
                print("\n".join(f"  | {line}" for line in text.splitlines()[-25:]), flush=True)
            keep(record)
    return record | {"clocks": "" if c.rehearse else machine().clocks()}


def run_one(command: Command, stage: Stage, c: Context, log: TextIO) -> int:
    """Its exit status; it has its own time, and no more than the stage."""
    if time.time() > c.end:
        log.write(f"NOT REACHED {name_of(command)}\n")
        log.flush()
        return PARTIAL
    log.write(f"$ {name_of(command)}\n")
    log.flush()
    run = rehearsed if c.rehearse else executed
    code = run(command, stage.environment, log.fileno(), min(c.end, time.time() + stage.seconds))
    log.write(f"\nexit {code}\n")
    log.flush()
    return code


def name_of(command: Command) -> str:
    """The same in every run: without who runs it, and until when."""
    words = ["python" if word == sys.executable else word for word in command]
    if "--until" in words:
        at = words.index("--until")
        del words[at : at + 2]
    return " ".join(words)


def read_from(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def status_of(code: int) -> str:
    return {0: "ok", PARTIAL: "partial", TIMEOUT: "timeout"}.get(code, "failed")


def executed(command: Command, environment: dict[str, str], log: int, end: float) -> int:
    """Its exit status; past the end, the command and all that it started are stopped."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=ROOT,
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
        with suppress(subprocess.TimeoutExpired):  # a driver may not let go of it
            process.wait(30)


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
            os.chdir(ROOT)
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
    here = machine()
    here.source.cache_clear()
    return {
        "gpu": "" if rehearse else torch.cuda.get_device_name(),
        "driver": "" if rehearse else here.driver(),
        "torch": torch.__version__,
        "commit": here.commit(),
        "source": here.source(),
        "kernels": here.kernels(),
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
