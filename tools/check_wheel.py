"""Checks a built wheel: its tags, what must ship, and an import with torch and numpy alone."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MUST_SHIP = [
    "restore_ext/_C.abi3.so",
    "restore_ext/py.typed",
    "restore_ext/pocket/model/model.safetensors",
    "restore_ext/pocket/model/tokenizer.json",
]
# Uses the package from the wheel where everything that the core must not need is refused.
CORE_ALONE = """
import sys
for name in ("transformers", "accelerate", "PIL", "tqdm", "safetensors"):
    sys.modules[name] = None
import torch, restore_ext
from restore_ext import ops
features = torch.randn(2, 20, 8)
assert restore_ext.reduce_tokens(features, keep=4, method="divprune").tokens.shape == (2, 4, 8)
assert sys.argv[1] in restore_ext.__file__, restore_ext.__file__
assert ("cuda" in ops.DEVICE_TYPES) == ("cu13" in sys.argv[2]), ops.DEVICE_TYPES
"""


def main(path: str) -> None:
    for tag in ("-cp310-abi3-", "manylinux"):
        assert tag in path, f"{path} must carry the tag {tag}"
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            missing = [name for name in MUST_SHIP if name not in names]
            assert not missing, f"{path} lacks {missing}"
            wheel.extractall(folder)
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {folder!r})\n{CORE_ALONE}",
                folder,
                Path(path).name,
            ],
            check=True,
            cwd=folder,
        )
    size = Path(path).stat().st_size / 2**20
    print(
        f"{Path(path).name}: {len(names)} files, {size:.1f} MiB, imports with torch and numpy alone"
    )


if __name__ == "__main__":
    main(sys.argv[1])
