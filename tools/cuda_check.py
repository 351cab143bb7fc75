"""Compiles every kernel for every architecture, as setup.py would, and looks at what came out.

python tools/cuda_check.py [--sass] [--archs 80,90a,100a,120] [--verbose] [FILE ...]

Fails on a warning, a spill, a stack frame, and with --sass on an instruction that an instance of a
kernel lacks or must not have, or on other registers than it is launched with (EXPECT, FORBIDDEN).
Needs nvcc, no GPU and no CUDA torch; --sass needs cuobjdump (pip install --no-deps
nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm). What has not changed is not compiled again. A file that
is for some architectures only says so in a comment line:

// Architectures: 90a 100a
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
ARCHS = ("80", "90a", "100a", "120")
FOLDER = Path("build/cuda_check")

TENSOR_CORES = ("HMMA", "LDSM", "LDGSTS")
FLOAT, HALF = r"<.*\bfloat\b", r"<(?!.*\bfloat\b)"  # its elements


@dataclass(frozen=True)
class Expected:
    """What each instance of a kernel must hold, by how its plain name begins."""

    file: str
    name: str  # a regular expression
    opcodes: tuple[str, ...] = ()
    registers: int | None = None  # exactly
    archs: tuple[str, ...] = ARCHS


# Its warpgroups hand registers over by setmaxnreg, and have no more than the block was launched
# with: 3 * 168 = 40 + 2 * 232, and 2 * 128 = 40 + 216.
HOPPER = ("calibrated_attention_hopper_kernel", "hopper::calibrated_attention_hopper_kernel<.*, ")
MOVED = ("HGMMA", "UTMALDG", "USETMAXREG")
EXPECT = [
    Expected("calibrated_attention_prefill_kernel", r"calibrated_\w+" + HALF, TENSOR_CORES),
    Expected("calibrated_attention_decode_kernel", "decode_kernel" + HALF, TENSOR_CORES),
    Expected("match_bipartite_kernel", "match_kernel" + HALF, TENSOR_CORES),
    Expected("match_bipartite_kernel", "match_kernel" + FLOAT, ("LDGSTS",)),
    Expected("assign_anchors_kernel", "assign_kernel" + HALF, TENSOR_CORES),
    Expected("assign_anchors_kernel", "assign_kernel" + FLOAT, ("LDGSTS",)),
    Expected("nearest_rivals_kernel", "nearest_rivals_kernel" + HALF, TENSOR_CORES),
    Expected("nearest_rivals_kernel", "nearest_rivals_kernel" + FLOAT, ("LDGSTS",)),
    Expected("row_scores_kernel", "(column_scores|row_sums)_kernel" + HALF, ("HMMA", "LDSM")),
    Expected(HOPPER[0], HOPPER[1] + "2>", MOVED, 168, ("90a",)),
    Expected(HOPPER[0], HOPPER[1] + "1>", MOVED, 128, ("90a",)),
    Expected(HOPPER[0], HOPPER[1], ("BPT",), None, ("80", "100a", "120")),  # a trap
]
FORBIDDEN = ("LDL", "STL")  # local memory, in every kernel

# The macros that torch.utils.cpp_extension would define: a kernel must build with them.
MACROS = " ".join(
    f"-D__CUDA_NO_{n}__"
    for n in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
)
RULES = """
rule nvcc
  command = {nvcc} -O3 -std=c++17 -lineinfo -Xcompiler=-fPIC -Xptxas=-v -Werror=all-warnings $
    {macros} -gencode=arch=compute_$arch,code=sm_$arch -MD -MF $out.d -c $in -o $out $
    > $out.log 2>&1 || (cat $out.log; false)
  depfile = $out.d
rule sass
  command = {cuobjdump} -sass $in > $out
"""
PTXAS = re.compile(
    r"Function properties for (\S+)\s+"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


@dataclass
class Kernel:
    name: str
    stack: int
    spill: int
    registers: int
    shared: int
    opcodes: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        found = [f"{self.stack} bytes of stack"] if self.stack else []
        found += [f"{self.spill} bytes spilled"] if self.spill else []
        return found + [f"holds {code}" for code in FORBIDDEN if code in self.opcodes]


@dataclass
class Job:
    source: Path
    arch: str

    @property
    def object(self) -> Path:
        return FOLDER / f"{self.source.stem}.{self.arch}.o"

    @property
    def sass(self) -> Path:
        return self.object.with_suffix(".sass")

    def kernels(self, with_sass: bool) -> dict[str, Kernel]:
        log = Path(f"{self.object}.log").read_text()
        kernels = {
            name: Kernel(
                name, int(stack), int(stores) + int(loads), int(registers), int(shared or 0)
            )
            for name, stack, stores, loads, registers, shared in PTXAS.findall(log)
        }
        if with_sass:
            for part in self.sass.read_text().split("Function : ")[1:]:
                opcodes = re.findall(
                    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", part
                )
                kernels[part.split()[0]].opcodes = opcodes
        return kernels

    def faults(self, kernels: dict[str, Kernel], with_sass: bool) -> list[str]:
        log = Path(f"{self.object}.log").read_text()
        found = [line for line in log.splitlines() if "Performance Loss" in line]  # serial wgmma
        for kernel in kernels.values():
            found += [f"{plain(kernel.name)}: {fault}" for fault in kernel.faults()]
        for expected in EXPECT if with_sass else []:
            if expected.file == self.source.stem and self.arch in expected.archs:
                found += missing(expected, kernels.values())
        return found


def missing(expected: Expected, kernels: Iterable[Kernel]) -> list[str]:
    """What the kernels that are meant lack, or that there are none."""
    named = {plain(kernel.name): kernel for kernel in kernels}
    meant = {name: k for name, k in named.items() if re.match(expected.name, name)}
    found = [] if meant else [f"no kernel is named {expected.name}"]
    for name, kernel in meant.items():
        found += [f"{name}: no {code}" for code in expected.opcodes if code not in kernel.opcodes]
        if expected.registers not in (None, kernel.registers):
            found.append(f"{name}: {kernel.registers} registers, not {expected.registers}")
    return found


@cache
def plain(name: str) -> str:
    """A kernel's name without its namespace and parameters."""
    command = ["c++filt", name]
    text = subprocess.run(command, capture_output=True, text=True).stdout.strip() or name
    text = re.sub(r"\(anonymous namespace\)::|restore_ext::cuda::", "", text)
    return re.sub(r"^void ", "", text).rsplit("(", 1)[0]


def architectures(source: Path, archs: list[str]) -> list[str]:
    marked = re.search(r"^// Architectures: (.*)$", source.read_text(), re.M)
    return [a for a in archs if not marked or a in marked[1].split()]


def find_cuobjdump() -> str | None:
    installed = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/cuobjdump"
    places = [os.environ.get("CUOBJDUMP"), installed, CUDA / "bin/cuobjdump"]
    return next((str(p) for p in places if p and Path(p).exists()), shutil.which("cuobjdump"))


def build(jobs: list[Job], cuobjdump: str | None, parallel: int) -> bool:
    FOLDER.mkdir(parents=True, exist_ok=True)
    rules = RULES.format(nvcc=CUDA / "bin/nvcc", macros=MACROS, cuobjdump=cuobjdump)
    lines = [f"builddir = {FOLDER}", rules]
    for job in jobs:
        lines.append(f"build {job.object}: nvcc {job.source}\n  arch = {job.arch}")
        if cuobjdump:
            lines.append(f"build {job.sass}: sass {job.object}")
    file = FOLDER / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    environment = dict(os.environ)
    if cuobjdump:  # it looks for nvdisasm beside itself on the path
        environment["PATH"] = f"{Path(cuobjdump).parent}:{environment['PATH']}"
    ninja = Path(sys.executable).parent / "ninja"
    command = [ninja if ninja.exists() else "ninja", "-f", file, "-k0", f"-j{parallel}", "--quiet"]
    return subprocess.run(command, env=environment).returncode == 0


def report(job: Job, with_sass: bool, verbose: bool) -> bool:
    """Prints a line for the object; says whether all is well."""
    kernels = job.kernels(with_sass)
    faults = job.faults(kernels, with_sass)
    registers = max((k.registers for k in kernels.values()), default=0)
    verdict = "FAIL" if faults else "ok"
    print(
        f"{verdict:4}  sm_{job.arch:4}  {job.source.name:44} "
        f"{len(kernels):3} kernels, up to {registers} registers"
    )
    for fault in faults:
        print(f"      {fault}")
    if verbose:
        for kernel in sorted(kernels.values(), key=lambda k: plain(k.name)):
            print(
                f"      {plain(kernel.name):72} {kernel.registers:3} registers, "
                f"{kernel.shared} bytes of static shared memory"
            )
    return not faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--archs", default=",".join(ARCHS))
    parser.add_argument("--sass", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="a line for every kernel")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if not (CUDA / "bin/nvcc").exists():
        print(f"SKIP: no {CUDA}/bin/nvcc")
        return 0
    cuobjdump = find_cuobjdump() if arguments.sass else None
    if arguments.sass and not cuobjdump:
        print("no cuobjdump: pip install --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return 1
    files = [Path(os.path.relpath(f, ROOT)) for f in arguments.files]
    os.chdir(ROOT)
    archs = arguments.archs.split(",")
    sources = files or sorted(Path("csrc/cuda").glob("*.cu"))
    jobs = [Job(source, arch) for source in sources for arch in architectures(source, archs)]
    built = build(jobs, cuobjdump, arguments.jobs)
    done = [job for job in jobs if (job.sass if cuobjdump else job.object).exists()]
    well = [report(job, arguments.sass, arguments.verbose) for job in done]
    print(f"{sum(well)} of {len(jobs)} objects are as they should be")
    return 0 if built and len(well) == len(jobs) and all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
