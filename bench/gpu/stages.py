"""The stages of the proof: what each runs, and what it needs. None takes longer than 9 minutes."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.machine import ROOT

Command = list[str]
MINUTES = 9.0
SPARE = 75  # seconds that a bench leaves of its stage for the case it is at
LAUNCHED = "launched.txt"  # in DIR
OPERATORS = (
    "match_bipartite",
    "score_anchors",
    "select_anchors",
    "assign_anchors",
    "merge_tokens",
    "select_diverse",
    "calibrated_attention",
    "calibrated_attention_paged",
    "row_scores",
)
REDUCE = OPERATORS[:6]
WATCHED = {  # every allocation on its own, so that no access falls into a neighbour
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
}


@dataclass(frozen=True)
class Context:
    out: Path
    rehearse: bool
    force: bool  # measure again what has been measured
    end: float  # when a stage is stopped

    def python(self, module: str, *arguments: str) -> Command:
        return [sys.executable, "-m", module, *arguments, *["--rehearse"] * self.rehearse]

    def bench(self, name: str, *arguments: str) -> Command:
        kept = ["--keep", "--results", str(self.out / "results")]
        kept += [] if self.force else ["--resume"]
        time = ["--seconds", "0.3", "--until", f"{self.end - SPARE:.0f}"]
        return self.python(f"bench.bench_{name}", *kept, *time, *arguments)


@dataclass(frozen=True)
class Stage:
    name: str
    says: str
    commands: Callable[[Context], list[Command]]
    needs: tuple[str, ...] = ()  # modules, programs and files
    environment: dict[str, str] = field(default_factory=dict)
    minutes: float = MINUTES


def lacking(stage: Stage, rehearse: bool) -> str:
    """What this machine lacks for a stage, in words."""
    missing = [need for need in stage.needs if not there(need, rehearse)]
    return f"not on this machine: {', '.join(missing)}" if missing else ""


def there(need: str, rehearse: bool) -> bool:
    if "/" in need:
        return (ROOT / need).is_file()
    if need.startswith("compute-"):
        return rehearse or shutil.which(need) is not None
    return importlib.util.find_spec(need) is not None


def build(c: Context) -> list[Command]:
    return [c.python("bench.gpu.build")]


def ceilings(c: Context) -> list[Command]:
    return [c.python("bench.gpu.ceilings", "--keep", "--results", str(c.out / "results"))]


def tests(only: str, *names: str) -> Callable[[Context], list[Command]]:
    def commands(c: Context) -> list[Command]:
        asked = ["-q", "-p", "no:cacheprovider", "--maxfail=30", "--durations=5"]
        if importlib.util.find_spec("transformers") is None:
            asked.append("--noconftest")  # which asks for its version
        files = [f"python_tests/test_{name}.py" for name in names]
        if not c.rehearse:
            return [[sys.executable, "-m", "pytest", *asked, "-k", only, *files]]
        # On a CPU, CI runs them all: here a few run, and the others are found.
        few = ["-k", "merge_tokens and cpu", files[0]]
        found = ["--collect-only", "-k", only.replace("cuda", "cpu"), *files]
        chosen = few if "gpu_streams" in names else found
        return [[sys.executable, "-m", "pytest", *asked, *chosen]]

    return commands


def sanitizer(tool: str) -> Callable[[Context], list[Command]]:
    def commands(c: Context) -> list[Command]:
        if c.rehearse:  # there is no such tool for a CPU
            return [c.python("bench.gpu.drive", "--op", "merge_tokens")]
        watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        return [[*watch, *c.python("bench.gpu.drive")]]

    return commands


def launches(c: Context) -> list[Command]:
    few = ["--op", "merge_tokens"] if c.rehearse else []
    return [c.python("bench.gpu.drive", *few, "--launches", str(c.out / LAUNCHED))]


def golden(c: Context) -> list[Command]:
    if c.rehearse:
        return [[sys.executable, "tools/golden.py", "--help"]]
    return [[sys.executable, "tools/golden.py", "record"]]


def attention(c: Context) -> list[Command]:
    return [c.bench("calibrated_attention")]


def decode(c: Context) -> list[Command]:
    return [c.bench("decode"), c.bench("calibrated_attention_paged")]


def scores(c: Context) -> list[Command]:
    return [c.bench("row_scores")]


def reduce(c: Context) -> list[Command]:
    return [c.bench(op) for op in REDUCE]


def model(c: Context) -> list[Command]:
    return [c.bench("model")]


STAGES = [
    Stage("build", "a library with every operator for this GPU", build),
    Stage("ceilings", "copy bandwidth, bf16 matmul, launch latency", ceilings, minutes=3),
    Stage(
        "tests-gpu",
        "streams, graphs, devices, memory",
        tests("cuda", "gpu_streams", "gpu_memory"),
        ("pytest",),
    ),
    Stage(
        "tests-tokens",
        "the token operators against their references",
        tests("cuda and not compiles", *REDUCE),
        ("pytest",),
    ),
    Stage(
        "tests-attention",
        "attention, in pages, and of some rows, against its reference",
        tests("cuda and not compiles", *OPERATORS[6:]),
        ("pytest",),
    ),
    Stage(
        "tests-compile", "under torch.compile", tests("cuda and compiles", *OPERATORS), ("pytest",)
    ),
    Stage("launches", "which kernels the operators launch, by the profiler", launches, minutes=3),
    *[
        Stage(
            f"sanitizer-{tool}",
            f"compute-sanitizer's {tool}",
            sanitizer(tool),
            ("compute-sanitizer",),
            WATCHED,
        )
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ],
    Stage(
        "golden",
        "single instructions, for the emulator to be held against",
        golden,
        ("tools/golden.py",),
    ),
    Stage("bench-attention", "prompts beside SDPA, FlexAttention and others", attention),
    Stage("bench-decode", "decoding steps beside the same, in pages too", decode),
    Stage("bench-scores", "what rows attend to beside plain torch, which stores it", scores),
    Stage("bench-reduce", "matching, anchors, merging, diversity beside torch", reduce),
    Stage(
        "model", "a hooked model of LLaVA's shape beside an unhooked one", model, ("transformers",)
    ),
]
