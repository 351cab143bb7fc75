"""Empty NVIDIA libraries, so that a CUDA torch can be imported where there are none.

python tools/stub_libraries.py TORCH/lib OUT     with LD_LIBRARY_PATH=OUT, `import torch` then works

A CUDA torch wheel links cuBLAS, cuDNN, NCCL and others that weigh gigabytes. To load the wheel,
registering operators and running them on the CPU included, the dynamic linker wants nothing of them
but their names, symbols and symbol versions; that is what these have. Nothing of CUDA can run.
"""

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM = [Path("/usr/local/cuda/lib64"), Path("/lib/x86_64-linux-gnu"), Path("/usr/lib64")]
# A symbol without a version does not say whose it is; its first letters do.
PREFIXES = {
    "cublasLt": "libcublasLt.",
    "cublas": "libcublas.",
    "cudnn": "libcudnn.",
    "cusparseLt": "libcusparseLt.",
    "cusparse": "libcusparse.",
    "cufft": "libcufft.",
    "curand": "libcurand.",
    "nccl": "libnccl.",
    "cuFile": "libcufile.",
    "cusolver": "libcusolver.",
    "nvshmem": "libnvshmem",
}


@dataclass
class Library:
    """What one shared library asks of others, and what it has."""

    needs: list[str] = field(default_factory=list)
    wants: dict[str, tuple[str, str | None, str]] = field(default_factory=dict)
    has: set[str] = field(default_factory=set)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(path: Path) -> Library:
    """wants: symbol -> its version, the library that has this version, its kind."""
    library = Library(re.findall(r"NEEDED\s+(\S+)", output("objdump", "-p", path)))
    owner, owners = None, {}
    for line in output("readelf", "-VW", path).splitlines():
        if file := re.search(r"File: (\S+)", line):
            owner = file[1]
        if version := re.search(r"Name: (\S+).*Version:", line):
            owners[version[1]] = owner
    for line in output("readelf", "--dyn-syms", "-W", path).splitlines():
        columns = line.split()
        if len(columns) < 8 or columns[4] not in ("GLOBAL", "WEAK", "UNIQUE"):
            continue
        name, _, version = columns[7].partition("@")
        version = version.strip("@")
        if columns[6] != "UND":
            library.has.add(name)
        elif columns[4] == "GLOBAL":
            library.wants[name] = (version, owners.get(version), columns[3])
    return library


def find(name: str, folders: list[Path]) -> Path | None:
    return next((f / name for f in folders if (f / name).exists()), None)


def main(torch_lib: Path, out: Path) -> None:
    folders = [torch_lib, *SYSTEM]
    libraries: dict[Path, Library] = {}
    queue = sorted(p for p in torch_lib.iterdir() if ".so" in p.name)
    missing: set[str] = set()
    while queue:
        path = queue.pop()
        if path in libraries:
            continue
        libraries[path] = read(path)
        for name in libraries[path].needs:
            found = find(name, folders)
            if found is None:
                missing.add(name)
            else:
                queue.append(found)

    has = set().union(*(library.has for library in libraries.values()))
    symbols: dict[str, dict[str, set[tuple[str, str]]]] = defaultdict(lambda: defaultdict(set))
    for path, library in libraries.items():
        if path.parent != torch_lib:
            continue
        for name, (version, owner, kind) in library.wants.items():
            if name in has:
                continue
            if owner not in missing:
                prefix = next((p for s, p in PREFIXES.items() if name.startswith(s)), None)
                owner = next((m for m in sorted(missing) if prefix and m.startswith(prefix)), None)
            if owner is not None:
                symbols[owner][version].add((name, kind))
    out.mkdir(parents=True, exist_ok=True)
    for name in sorted(missing):
        build(name, symbols[name], out)
        print(f"{name}: {sum(map(len, symbols[name].values()))} symbols")


def build(name: str, symbols: dict[str, set[tuple[str, str]]], out: Path) -> None:
    source, versions = [], []
    for version, members in sorted(symbols.items()):
        names = sorted(n for n, _ in members)
        objects = {n for n, kind in members if kind == "OBJECT"}
        source += [
            f"char {n}[256];" if n in objects else f"long {n}(void) {{ return 1; }}" for n in names
        ]
        if version:
            versions.append(f"{version} {{ global: {'; '.join(names)}; }};")
    text, script = out / f"{name}.c", out / f"{name}.map"
    text.write_text("\n".join(source) + "\n")
    script.write_text("\n".join(versions) + "\n")
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-w",
        f"-Wl,-soname,{name}",
        "-o",
        str(out / name),
        str(text),
    ]
    subprocess.run(
        [*command, *([f"-Wl,--version-script={script}"] if versions else [])], check=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
