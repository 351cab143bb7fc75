"""The stages of the proof: what each runs, and what it needs. None takes longer than 9 minutes.

In their order half an hour tells the most: whether every kernel runs at all, is right, reads what
it must not, and how fast it is; the rest follows. A command has an operator of its own, so that one
that hangs, or leaves the device in error, costs no other.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # bench.machine's asks for the library, see build.py
CUDA = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
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
KERNELS = ("decode", "hopper", "prefill", "plain")  # that calibrated_attention can be forced to
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
    seconds: float = 60 * MINUTES  # that a single command may take


def lacking(stage: Stage, rehearse: bool) -> str:
    """What this machine lacks for a stage, in words."""
    missing = [need for need in stage.needs if not there(need, rehearse)]
    return f"not on this machine: {', '.join(missing)}" if missing else ""


def there(need: str, rehearse: bool) -> bool:
    if "/" in need:
        return (ROOT / need).is_file()
    if need == SANITIZER:
        return rehearse or sanitizer_program() is not None
    return importlib.util.find_spec(need) is not None


def build(c: Context) -> list[Command]:
    return [c.python("bench.gpu.build")]


def ceilings(c: Context) -> list[Command]:
    return [c.python("bench.gpu.ceilings", "--keep", "--results", str(c.out / "results"))]


def smoke(c: Context) -> list[Command]:
    if c.rehearse:
        return [c.python("bench.gpu.drive", "--op", "merge_tokens", "--short")]
    ways = [(op, "") for op in OPERATORS] + [("calibrated_attention", k) for k in KERNELS]
    return [
        c.python("bench.gpu.drive", "--short", "--op", op, "--kernel", kernel)
        for op, kernel in ways
    ]


def test_files(name: str) -> list[str]:
    """Those of an operator, or of another subject; without those of operators named longer."""
    longer = [op for op in OPERATORS if op.startswith(name) and op != name]
    files = sorted((ROOT / "python_tests").glob(f"test_{name}*.py"))
    own = [f for f in files if not f.name.startswith(tuple(f"test_{op}" for op in longer))]
    return [f"python_tests/{f.name}" for f in own]


def tests(only: str, *names: str) -> Callable[[Context], list[Command]]:
    def commands(c: Context) -> list[Command]:
        asked = ["-q", "-p", "no:cacheprovider", "--maxfail=30", "--durations=5"]
        asked += ["-o", "faulthandler_timeout=60"]  # a test that hangs says where
        if importlib.util.find_spec("transformers") is None:
            asked.append("--noconftest")  # which asks for its version
        run = [sys.executable, "-m", "pytest", *asked]
        if not c.rehearse:
            return [[*run, "-k", only, *test_files(name)] for name in names]
        # On a CPU, CI runs them all: here a few run, and the others are found.
        if "gpu_streams" in names:
            return [[*run, "-k", "merge_tokens and cpu", *test_files("gpu_streams")]]
        files = [file for name in names for file in test_files(name)]
        return [[*run, "--collect-only", "-k", only.replace("cuda", "cpu"), *files]]

    return commands


SANITIZER = "compute-sanitizer"


def sanitizer_program() -> str | None:
    """On the PATH, or in the toolkit, which need not be there."""
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=str(CUDA / "bin"))


def sanitizer(tool: str, *arguments: str) -> Callable[[Context], list[Command]]:
    def commands(c: Context) -> list[Command]:
        if c.rehearse:  # there is no such tool for a CPU
            return [c.python("bench.gpu.drive", "--op", "merge_tokens", *arguments)]
        watch = [sanitizer_program() or SANITIZER, "--tool", tool, "--error-exitcode", "9"]
        return [[*watch, *c.python("bench.gpu.drive", "--op", op, *arguments)] for op in OPERATORS]

    return commands


def launches(c: Context) -> list[Command]:
    few = ["--op", "merge_tokens"] if c.rehearse else []
    return [c.python("bench.gpu.drive", *few, "--launches", str(c.out / LAUNCHED))]


def golden(c: Context) -> list[Command]:
    if c.rehearse:
        return [[sys.executable, "tools/golden.py", "--help"]]
    return [[sys.executable, "tools/golden.py", "record", str(c.out / "golden")]]


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


def watched(name: str, says: str, *tool: str) -> Stage:
    return Stage(f"sanitizer-{name}", says, sanitizer(*tool), (SANITIZER,), WATCHED, seconds=180)


STAGES = [
    Stage("build", "a library with every operator for this GPU", build),
    Stage("smoke", "every kernel once: does it run, and end?", smoke, seconds=30),
    Stage(
        "tests-tokens",
        "the token operators against their references",
        tests("cuda and not compiles", *REDUCE),
        ("pytest",),
        seconds=180,
    ),
    Stage(
        "tests-attention",
        "attention, in pages, and of some rows, against its reference",
        tests("cuda and not compiles", *OPERATORS[6:]),
        ("pytest",),
        seconds=300,
    ),
    Stage(
        "tests-gpu",
        "streams, graphs, devices, memory",
        tests("cuda", "gpu_streams", "gpu_memory"),
        ("pytest",),
        seconds=300,
    ),
    Stage("launches", "which kernels the operators launch, by the profiler", launches, minutes=3),
    watched("short", "compute-sanitizer's memcheck, bfloat16 alone", "memcheck", "--short"),
    Stage("ceilings", "copy bandwidth, bf16 matmul, launch latency", ceilings, minutes=3),
    Stage("bench-attention", "prompts beside SDPA, FlexAttention and others", attention),
    Stage("bench-decode", "decoding steps beside the same, in pages too", decode),
    Stage("bench-reduce", "matching, anchors, merging, diversity beside torch", reduce),
    # The rest.
    Stage(
        "golden",
        "single instructions, for the emulator to be held against",
        golden,
        ("tools/golden.py",),
    ),
    Stage(
        "tests-compile",
        "under torch.compile",
        tests("cuda and compiles", *OPERATORS),
        ("pytest",),
        seconds=180,
    ),
    *[
        watched(tool, f"compute-sanitizer's {tool}", tool)
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ],
    Stage("bench-scores", "what rows attend to beside plain torch, which stores it", scores),
    Stage(
        "model", "a hooked model of LLaVA's shape beside an unhooked one", model, ("transformers",)
    ),
]
