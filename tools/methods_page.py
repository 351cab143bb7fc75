"""Writes the table of docs/methods.md from what the methods say of themselves.

python -m tools.methods_page [--check]      --check writes nothing, and fails where it would
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.table import replaced
from restore_ext.methods import cards
from restore_ext.methods.catalogue import as_markdown

PAGE = Path(__file__).parent.parent / "docs/methods.md"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.methods_page", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    before = PAGE.read_text()
    after = replaced(before, "methods", as_markdown(cards()))
    if after == before:
        return
    if check:
        sys.exit("docs/methods.md is not what the methods say: python -m tools.methods_page")
    PAGE.write_text(after)


if __name__ == "__main__":
    main()
