"""restore-ext serve: the process from its first line to its exit code, and what it refuses."""

import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from serving import PICTURES, SCENES, ask, client_of, messages, text_of

import restore_ext.cli.serve
from restore_ext import serve as serving
from restore_ext.cli import main
from restore_ext.hf import compat


def test_a_real_process_serves_and_ends_by_sigint():
    command = [sys.executable, "-m", "restore_ext", "serve", "pocket", "--port", "0"]
    command += ["--method", "vispruner", "--keep", "64"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        line = process.stdout.readline()
        assert re.fullmatch(r"serving pocket at http://127\.0\.0\.1:\d+/v1\n", line), line
        client = client_of(line.split()[-1].removesuffix("/v1"))
        answer = ask(client, 2)
        assert answer.usage.restore_ext["visual_tokens"]["last_layer"] == 64
        typed = messages(SCENES[2].question.text.upper().replace(" ?", "?"), PICTURES[2])
        assert text_of(ask(client, messages=typed)) == text_of(answer)
        stream = ask(client, 2, stream=True, max_tokens=40)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        assert list(stream)[-1].choices[0].finish_reason == "length", "what runs is finished"
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize("number", restore_ext.cli.serve.SIGNALS)
def test_each_signal_stops_it_and_its_handler_comes_back(number):
    """A real process is ended by SIGTERM where the blocks of docs/serve.md run."""
    before, server = signal.getsignal(number), SimpleNamespace(should_exit=False)
    with restore_ext.cli.serve._stopped_by_signals(server):
        signal.raise_signal(number)
        assert server.should_exit
    assert signal.getsignal(number) is before and signal.SIGTERM in restore_ext.cli.serve.SIGNALS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "best"], "--method must be one of"),
        (["--keep", "0"], "--keep must be at least 1, got 0"),
        (["--method", "tome_vit", "--keep", "9"], "MODEL: pocket: keep must be at least 36"),
        (["--max-images", "0"], "--max-images must be at least 1, got 0"),
        (["--max-image-pixels", "1000000000"], "--max-image-pixels must be at most 89478485"),
        (["--port", "65536"], "--port must be in 0..65535, got 65536"),
        (["--shutdown-seconds", "-1"], "--shutdown-seconds must be at least 0, got -1"),
        (["--schedule", "nowhere.json"], "--schedule: "),
        (["--device", "meta"], "--device: meta cannot be used: it holds no numbers"),
        (["--device", "abacus"], "--device: abacus cannot be used"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys):
    assert main(["serve", "pocket", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"restore-ext: error: {message}")


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("restore-ext: error: MODEL: the folder")


def test_a_port_in_use_is_one_line(capsys, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "pocket", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_what_is_missing_or_too_old_is_said(monkeypatch, capsys):
    monkeypatch.setattr(compat, "VERSION", (5, 14, 9))
    assert main(["serve", "pocket"]) == 2
    assert "serve needs transformers >= 5.15, got 5.14.9: pip" in capsys.readouterr().err
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else 1)
    assert main(["serve", "pocket"]) == 2
    assert "serve needs uvicorn: pip install" in capsys.readouterr().err


def test_an_interrupt_while_it_loads_leaves_no_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(restore_ext.cli.serve, "load", interrupted)
    assert main(["serve", "pocket"]) == 130
    assert capsys.readouterr().err == ""
