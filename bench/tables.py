"""Writes every table of the README and the docs from what was measured and from what the code says.

python -m bench.tables [--check]      --check writes nothing, and fails where it would

A table stands in its page between <!-- NAME:begin --> and <!-- NAME:end -->.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import demo, diagnosed, eval_ocr, eval_pocket, measured, search_pocket
from bench.gpu.collect import RESULTS, passed
from bench.gpu.table import numbers, proof_table
from bench.machine import ROOT
from restore_ext.hf.families import catalogue
from restore_ext.methods import cards
from restore_ext.methods.catalogue import as_markdown


@dataclass(frozen=True)
class Table:
    """What stands in a page, between the markers of a name; without a name, all of the page."""

    page: str
    name: str | None
    text: Callable[[], str]


TABLES = [
    Table("README.md", "brief-table", eval_pocket.brief_table),
    Table("docs/quickstart.md", "demo", demo.block),
    Table("docs/pocket.md", "pocket-table", eval_pocket.tables),
    Table("docs/ocr.md", "ocr-table", eval_ocr.tables),
    Table("docs/search.md", "search-table", search_pocket.tables),
    Table("docs/gpu_proof.md", "bench", lambda: numbers(RESULTS)),
    Table("docs/gpu_proof.md", "proof", lambda: proof_table(passed(RESULTS))),
    Table("docs/methods.md", "methods", lambda: as_markdown(cards())),
    Table("docs/families.md", None, lambda: catalogue.page() + "\n"),
    *(Table("docs/diagnose.md", name, text) for name, text in diagnosed.TABLES.items()),
    *(Table("docs/bench.md", name, text) for name, text in measured.TABLES.items()),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    stale = {}
    for name in dict.fromkeys(table.page for table in TABLES):
        before = (ROOT / name).read_text()
        after = written(before, [table for table in TABLES if table.page == name])
        if after != before:
            stale[name] = after
    for name, page in stale.items():
        if not check:
            (ROOT / name).write_text(page)
        print(f"{name} {'is not what its tables say' if check else 'written'}")
    sys.exit(1 if stale and check else 0)


def written(page: str, tables: Sequence[Table]) -> str:
    """The page with its tables as they are now."""
    for table in tables:
        page = table.text() if table.name is None else replaced(page, table.name, table.text())
    return page


def replaced(page: str, mark: str, text: str) -> str:
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have {begin} and {end} once each")
    head, rest = page.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
