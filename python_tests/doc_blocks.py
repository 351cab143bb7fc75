"""Runs the code blocks of a page as its reader would, from the top down.

```python           runs, in one namespace for the page
```sh               runs line by line: restore-ext ..., python -m ...; of make the plan alone (-n)
```sh server        a restore-ext command that stays up while the rest of the page runs
```json             is JSON
```text             is not run
```text output      is what the block in front printed, but for times and memory
```text output varies   the same, but for every number (a clock's, or one that hangs on rounding)
<!--python ... -->  runs and is not seen: what a page takes for granted

A word behind the language says what a block cannot do without: gpu, hub (a model hub or another
network), vllm, or slow (minutes). Of those, only the options of our own commands are checked.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore_ext.cli import command_parser, main

# What a block of text must not begin with: it would not be run.
COMMANDS = ("$ ", "python ", "restore-ext ", "curl ", "bench/", "pip ")
# Numbers that no two runs agree on, by their unit.
RUNS = re.compile(
    r"(?<![\w.])\d[\d,.]*(?= ?(?:us|ms|s|seconds|min|[MG]i?B|tok/s|tokens/s|x faster)\b)"
)
DECIMAL = re.compile(r"\d+\.\d+")
LANGUAGES = ("python", "sh", "json", "text")
ELSEWHERE = ("gpu", "hub", "vllm", "slow")
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!--python\n(?P<hidden>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    language: str
    words: tuple[str, ...]
    code: str
    line: int  # of the page, of its first line of code


def blocks(text: str) -> list[Block]:
    """All blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"]
        code = match["code"] if hidden is None else hidden
        info = match["info"].split() if hidden is None else ["python"]
        language, *words = info or [""]
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(language, tuple(words), _dedent(code, match["indent"] or ""), line))
    return found


def _dedent(code: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))


class Page:
    """A page being read, in the current folder."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""
        self.servers: list[subprocess.Popen[str]] = []

    def run(self, text: str) -> int:
        """Runs what can run here, and returns how many blocks that were."""
        ran = 0
        try:
            for block in blocks(text):
                ran += self._run(block)
        finally:
            for server in self.servers:
                _stop(server)
        return ran

    def _run(self, block: Block) -> bool:
        where = f"{self.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: ```{block.language} is none of {LANGUAGES}"
        if set(block.words) & set(ELSEWHERE):
            if block.language == "sh":
                _check_options(block.code)
            return False
        if block.language == "json":
            json.loads(block.code)
        elif block.language == "text":
            first = block.code.lstrip()
            assert not first.startswith(COMMANDS), f"{where}: a command is ```sh, or marked gpu"
            if "output" not in block.words:
                return False
            every = "varies" in block.words
            wanted, came = masked(block.code, every), masked(self.printed, every)
            assert alike(came, wanted), f"{where}: printed\n{came}\nand the page has\n{wanted}"
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if block.language == "python":
                    lines = "\n" * (block.line - 1)  # a traceback then has the page's line
                    exec(compile(lines + block.code, self.name, "exec"), self.namespace)
                else:
                    for command in commands(block.code):
                        self._command(command, where, "server" in block.words)
            self.printed = out.getvalue()
        return True

    def _command(self, words: list[str], where: str, stays: bool) -> None:
        program, *arguments = words
        if stays:
            assert program == "restore-ext", f"{where}: {program} is no server of ours"
            self.servers.append(_start(arguments))
        elif program == "restore-ext":
            assert main(arguments) == 0, f"{where}: {shlex.join(words)} failed"
        elif program == "python" and arguments[0] == "-m":
            _module(arguments[1], arguments[2:], where)
        elif program == "curl":
            assert self.servers, f"{where}: no server of this page is up"
            print(subprocess.run([program, "-sS", *arguments], check=True, **_TEXT).stdout)
        elif program == "make":
            subprocess.run([program, "-n", *arguments], check=True, capture_output=True)
        else:
            raise AssertionError(f"{where}: {program} is not run by tests: say it outside a block")


_TEXT: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE}


def commands(code: str) -> Iterator[list[str]]:
    """The command lines of a shell block, as words; a prompt in front is left out."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


def _check_options(code: str) -> None:
    """Parses what calls restore-ext, by itself or below another program."""
    for words in commands(code):
        for i, word in enumerate(words):
            if word == "restore-ext" or words[i - 1 : i + 1] == ["-m", "restore_ext"]:
                command_parser().parse_args(words[i + 1 :])


def masked(text: str, every: bool = False) -> str:
    """Without what differs from run to run: times and the memory of a process, or every number,
    and the width of columns."""
    text = re.sub(r"\d[\d,.]*", "#", text) if every else RUNS.sub("#", text)
    return re.sub(r"[ \t]+|-{2,}", " ", text).strip()


def alike(came: str, wanted: str) -> bool:
    """The same text, decimals within what another CPU rounds otherwise."""
    if DECIMAL.sub("#", came) != DECIMAL.sub("#", wanted):
        return False
    pairs = zip(*(map(float, DECIMAL.findall(text)) for text in (came, wanted)), strict=True)
    return all(abs(a - b) <= 0.0011 + 0.01 * abs(b) for a, b in pairs)


def _module(name: str, arguments: list[str], where: str) -> None:
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{where}: python -m {name} ended with {end.code}"
    finally:
        sys.argv = before


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    """A server that answers under /health."""
    port = int(arguments[arguments.index("--port") + 1])
    server = subprocess.Popen(
        [sys.executable, "-m", "restore_ext", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    for _ in range(600):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return server
        assert server.poll() is None, f"the server ended: {server.communicate()[0]}"
        time.sleep(0.1)
    raise AssertionError(f"no server on port {port} after a minute: {_stop(server)}")


def _stop(server: subprocess.Popen[str]) -> str:
    server.send_signal(signal.SIGTERM)
    output = server.communicate(timeout=60)[0]
    assert server.returncode == 0, f"the server ended with {server.returncode}: {output}"
    return output
