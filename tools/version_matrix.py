"""Runs the tests of hook and pocket model under several transformers, each in its own folder.

    python tools/version_matrix.py                  all the versions that are supported
    python tools/version_matrix.py 5.17.0 -- -x     one of them; what follows -- goes to pytest

A version is installed once, into build/tf-<version>, with the huggingface_hub and tokenizers it
wants but without torch, and put in front of the environment this script runs in. What a version
lacks is tested to be refused: a skipped test counts as a failure here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

VERSIONS = ("4.57.6", "5.17.0", "5.23.0")
ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
QUANT = BUILD / "quant"  # the libraries of 8-bit weights, by make build/quant/ready
TESTS = ["python_tests", "-o", "python_files=test_naive.py test_hf_*.py test_pocket.py"]


def folder(version: str) -> Path:
    """Where this version lies, installed if it is not there yet."""
    target = BUILD / f"tf-{version}"
    if not target.exists():
        half = target.with_suffix(target.suffix + "-installing")
        shutil.rmtree(half, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", half, f"transformers=={version}"], check=True)
        if (half / "torch").exists():
            raise SystemExit(f"transformers {version} brought a torch along: remove {half}")
        half.rename(target)
    return target


def run(version: str, arguments: list[str]) -> dict[str, str]:
    """Runs the tests under one version; the row of the table."""
    paths = [str(folder(version)), str(ROOT), str(QUANT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    asked = "import huggingface_hub as h, transformers as t; print(t.__version__, h.__version__)"
    found = subprocess.check_output(
        [sys.executable, "-c", asked], env=environment, cwd=ROOT, text=True
    )
    transformers, hub = found.split()
    if transformers != version:
        raise SystemExit(f"wanted transformers {version}, but {transformers} is imported")
    report = BUILD / f"tf-{version}.xml"
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    code = subprocess.run([*pytest, *TESTS, *arguments], env=environment, cwd=ROOT).returncode
    row = {"transformers": transformers, "hub": hub}
    if not report.exists():
        return {**row, "result": f"pytest died ({code})"}
    suite = xml.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"] + counts["skipped"]
    good = code == 0 and bad == 0 and counts["tests"] > 0
    row |= {name: str(count) for name, count in counts.items()}
    return {
        **row,
        "seconds": f"{float(suite.get('time', 0)):.0f}",
        "result": "ok" if good else "FAILED",
    }


def table(rows: list[dict[str, str]]) -> str:
    """The rows under the names of all their columns, aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.append(names.pop(names.index("result")))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="transformers versions")
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    versions = parser.parse_args(given[:at]).versions
    rows = [run(version, given[at + 1 :]) for version in versions]
    print(table(rows))
    return int(any(row["result"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
