"""Every bench once, in one process: providers agree, and the clock runs. The times mean little."""

import runpy
import sys
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("bench_*.py")):
    name = f"bench.{path.stem}"
    print(f"\n{name}", flush=True)
    sys.argv = [name, "--dtype", "float32", "--seconds", "0.01"]
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
