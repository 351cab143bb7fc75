"""CUDA architectures as TORCH_CUDA_ARCH_LIST names them: what is built, and where it runs.

A name is "8.0", with "+PTX" if its PTX is kept for newer GPUs, or "9.0a": with what that chip alone
has. setup.py runs this file before there is a package, so it imports nothing of it.
"""

import re
from functools import cache

NAME = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
OLDEST = (8, 0)  # the compute capability that the kernels start at
Capability = tuple[int, int]


def wanted(text: str) -> tuple[list[str], list[str]]:
    """The architectures of a list to build for, and what is to be said about them.

    9.0 is built as 9.0a, or the kernels that are for Hopper would be empty: nothing but a GPU of
    9.0 runs either. What is older than the kernels is left out. Raises ValueError where nothing is
    left, and at what is no number.
    """
    names: dict[str, str] = {}
    said = []
    for given in text.replace(";", " ").replace(",", " ").split():
        number = NAME.fullmatch(given)
        if number is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must name numbers like 8.0+PTX, got {given!r}")
        if (int(number[1]), int(number[2])) < OLDEST:
            said.append(f"{given} is left out: the kernels need 8.0 or newer")
            continue
        name, ptx = given.removesuffix("+PTX"), number[4] or ""
        if name == "9.0":
            name = "9.0a"
            said.append(f"{given} is built as {name}{ptx}, which has the kernels for Hopper")
        names[name] = names.get(name) or ptx
    if not names:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST must name 8.0 or a newer one, got {text!r}")
    return [name + ptx for name, ptx in names.items()], said


def gencode(names: list[str], only: list[str] | None = None) -> str:
    """nvcc's options for machine code, and for PTX where it is kept: never that of one chip alone.

    With `only` ("90a", ...) what a kernel is for, and all of it where none of that is wanted: its
    launcher is linked in any case.
    """
    codes = [name.removesuffix("+PTX").replace(".", "") for name in names]
    newer = [c.rstrip("af") for c, name in zip(codes, names, strict=True) if name.endswith("+PTX")]
    if only is not None:
        codes, newer = [c for c in codes if c in only] or only, []
    options = [f"arch=compute_{c},code=sm_{c}" for c in codes]
    options += [f"arch=compute_{c},code=compute_{c}" for c in newer]
    return " ".join(f"-gencode={option}" for option in options)


def runs(built: str, capability: Capability) -> bool:
    """Whether a GPU runs what was built for an architecture.

    Machine code runs on its major version from its minor on; with an `a`, there alone. PTX runs on
    all that is as new or newer.
    """
    name = NAME.fullmatch(built)
    if name is None:
        raise ValueError(f"built must be an architecture like 8.0+PTX, got {built!r}")
    major, minor = int(name[1]), int(name[2])
    if name[4] and (major, minor) <= capability:
        return True
    least = minor == capability[1] if name[3] == "a" else minor <= capability[1]
    return major == capability[0] and least


@cache
def has_code(names: str, capability: Capability) -> bool:
    """Whether any of the architectures, names with a space between them, runs on a GPU."""
    return any(runs(name, capability) for name in names.split())
