"""The lines that only a GPU runs, run against a stand-in of torch.cuda: no typo waits there."""

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import clock, harness, machine, rows
from bench.gpu import ceilings, collect, proof
from bench.gpu.stages import Stage
from bench.harness import Gpu
from bench.provider import OURS, Peer, compiled, need


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        """Nothing to record."""

    def synchronize(self):
        """Nothing to wait for."""

    def elapsed_time(self, other):
        return 0.02  # ms


class Graph:
    """A replay counts; it computes nothing."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as far as the bench uses it; what was called, in order."""
    called = []

    def noted(name, result=None):
        def fn(*arguments, **options):
            called.append((name, *arguments))
            return result

        monkeypatch.setattr(torch.cuda, name, fn)

    @contextmanager
    def graph(g):
        called.append(("graph",))
        yield
        called.append(("graph ends",))

    stream = SimpleNamespace(wait_stream=lambda other: called.append(("wait_stream",)))
    noted("synchronize")
    noted("_sleep")
    noted("set_sync_debug_mode")
    noted("reset_peak_memory_stats")
    noted("empty_cache")
    noted("memory_allocated", 100)
    noted("max_memory_allocated", 170)
    noted("is_available", True)
    noted("get_device_name", "Some GPU")
    noted("get_device_properties", SimpleNamespace(L2_cache_size=100))
    noted("current_stream", stream)
    noted("Stream", stream)
    noted("stream", nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch, "empty", lambda *_, **options: torch.zeros(1))
    for module in (machine, rows, ceilings):
        monkeypatch.setattr(module, "driver", lambda: "1.2")
    return called


def test_the_clocks(gpu):
    x = torch.zeros(3)
    assert clock.cold_seconds(lambda: x.add_(1)) == pytest.approx(2e-5)
    assert clock.loop_seconds(lambda: x.add_(1), "cuda") > 0
    assert x.tolist() == [1.0 + clock.LOOP] * 3
    replay = clock.Replay([lambda: x.add_(1)] * 4, "cuda")
    assert replay.seconds() == pytest.approx(2e-5 / 4) and Graph.replays >= 2
    names = [name for name, *_ in gpu]
    assert names.index("stream") < names.index("graph"), "warmed up before it is captured"
    assert clock.l2_bytes("cuda") == 100 and clock.l2_bytes("cpu") > 0


def test_streams_syncs_and_memory(gpu):
    with clock.side_stream("cuda"):
        clock.keep_busy("cuda")
    with pytest.raises(ValueError), clock.no_host_sync("cuda"):
        raise ValueError
    modes = [rest for name, *rest in gpu if name == "set_sync_debug_mode"]
    assert modes == [["error"], ["default"]] and ("_sleep", 100_000_000) in gpu
    assert clock.extra_bytes(lambda: None, "cuda") == 70
    assert clock.extra_bytes(lambda: None, "cpu") == 0


def test_copies_are_alike_and_elsewhere():
    given = {"x": torch.rand(4, 3).T, "k": 2}
    first, *others = clock.copies(given, 3)
    assert first is given and len(others) == 2
    for other in others:
        assert torch.equal(other["x"], given["x"]) and other["k"] == 2
        assert other["x"].data_ptr() != given["x"].data_ptr()
        assert other["x"].stride() == given["x"].stride()


class Case:
    def arguments(self, device, dtype):
        assert device == "cuda"
        return {"x": torch.ones(3, dtype=dtype)}

    def __str__(self):
        return "toy"


def test_a_bench_on_a_gpu(gpu, monkeypatch, tmp_path, capsys):
    def check(out, x):
        assert torch.equal(out, x + 1)
        return 0.0

    def breaks(**given):
        raise RuntimeError("No available kernel\nat all")

    def never_captured(x):
        if ("graph",) in gpu and gpu[-1] == ("graph",):
            raise RuntimeError("not while capturing")
        return x + 1

    providers = {"plain": lambda x: x + 1, OURS: lambda x: x + 1}
    peers = {"broken": Peer(breaks), "eager": never_captured}
    monkeypatch.setattr(harness, "DEVICES", ["cpu", "cuda"])
    monkeypatch.setattr(harness, "SHORT", 1e9)
    monkeypatch.setattr(harness, "ROUNDS", 7)
    argv = ["bench", "--device", "cuda", "--keep", "--results", str(tmp_path), "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        harness.main(
            "toy",
            [],
            providers,
            check,
            gpu=Gpu([Case()], [], peers),
            cost=lambda given: (4e6, 2e6),
        )
    assert stop.value.code == 0
    kept = rows.read(tmp_path / "Some_GPU.csv")
    assert {r["driver"] for r in kept} == {"1.2"}
    (broken,) = [r for r in kept if r["provider"] == "broken"]
    assert broken["note"] == "failed: RuntimeError: No available kernel" and not broken["us"]
    ways = {(r["how"], r["cache"]) for r in kept if r["provider"] == OURS}
    assert ways == {("call", "cold"), ("loop", "warm"), ("graph", "warm"), ("graph", "cold")}
    assert {r["how"] for r in kept if r["provider"] == "eager"} == {"call", "loop"}
    assert "eager cannot be captured" in capsys.readouterr().out
    called = next(r for r in kept if r["how"] == "call" and r["provider"] == OURS)
    assert called["us"] == "20.0" and called["tflops"] == "0.2" and called["gbs"] == "100.0"


def test_ceilings_on_a_gpu(gpu, monkeypatch, capsys):
    for name in ("randint", "randn", "ones"):
        plain = getattr(torch, name)

        def small(*shape, fn=plain, name=name, **options):
            options.pop("device")
            return fn(256, (4,), **options) if name == "randint" else fn(4, 4, **options)

        monkeypatch.setattr(torch, name, small)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    ceilings.main([])
    said = capsys.readouterr().out
    assert "Some GPU" in said and "copy 4096 MiB" in said and "matmul 8192" in said


def test_the_proof_on_a_gpu(gpu, monkeypatch, tmp_path):
    results = tmp_path / "results"
    stages = [
        Stage("trial", "one", lambda c: [[sys.executable, "-c", "print('fine')"]]),
        Stage("broken", "two", lambda c: [[sys.executable, "-c", "raise SystemExit(2)"]]),
    ]
    monkeypatch.setattr(proof, "STAGES", stages)
    monkeypatch.setattr(proof, "RESULTS", results)
    with pytest.raises(SystemExit) as stop:
        proof.main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    record = collect.passed(results)["Some GPU"]
    assert list(record) == ["trial"] and record["trial"]["driver"] == "1.2"
    assert record["trial"]["kernels"] == machine.kernels()


def test_what_is_optional_is_missing_not_fatal():
    with pytest.raises(Exception, match="needs a GPU"):
        need("flashinfer", torch.ones(1))
    there = SimpleNamespace(is_cuda=True)
    with pytest.raises(Exception, match="no_such_module is not installed"):
        need("no_such_module", there)
    assert need("math", there).pi > 3
    fn = torch.sin
    assert compiled(fn, torch.device("cpu")) is fn
    assert compiled(fn, torch.device("cuda")) is not fn
