"""Every code block of the documentation runs, and the site builds with every link in it good."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import LANGUAGES, Page, alike, blocks, commands, masked

from tools.docstrings import as_markdown

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_every_block_runs(page, tmp_path, monkeypatch):
    for thing in ROOT.iterdir():
        if thing.name == "README.md":
            shutil.copy(thing, tmp_path)
        elif thing.name == "docs":
            shutil.copytree(thing, tmp_path / "docs")
        elif not thing.name.startswith("."):
            (tmp_path / thing.name).symlink_to(thing)
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    ran = Page(str(page.relative_to(ROOT))).run(text)
    runnable = [b for b in blocks(text) if b.language != "text" and b.words in ((), ("server",))]
    assert ran >= len(runnable)


def test_fences_are_all_seen():
    """What looks like a fence to a reader is one to the tests: none is left open."""
    for page in PAGES:
        fences = [line for line in page.read_text().splitlines() if line.lstrip()[:3] == "```"]
        seen = [b for b in blocks(page.read_text())]
        hidden = page.read_text().count("<!--python\n")
        assert len(fences) == 2 * (len(seen) - hidden), page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nassert 1 + 1 == 3\n```\n", AssertionError),
        ("<!--python\nx = 1\n-->\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nprint('three', 3)\n```\n```text output\nfour 4\n```\n", "and the page has"),
        ("```python\nprint(3)\n```\n```text output\n4\n```\n", "and the page has"),
        ("```text\n$ curl http://127.0.0.1/\n```\n", "a command is"),
        ("```text\npython -m bench.tables\n```\n", "a command is"),
        ("```sh\ncurl http://127.0.0.1/\n```\n", "no server of this page is up"),
        ("```json\n{'a': 1}\n```\n", ValueError),
        ("```\nls\n```\n", "is none of"),
        ("```sh\nls\n```\n", "ls is not run by tests"),
        ("```sh\nrestore-ext demo --method best\n```\n", "failed"),
        ("```sh gpu\nnsys profile python -m restore_ext demo --devise cuda\n```\n", SystemExit),
        ("```sh\nmake nothing\n```\n", subprocess.CalledProcessError),
        ("```sh\npython -m bench.tables --what\n```\n", "ended with 2"),
    ],
)
def test_a_block_that_is_wrong_fails(text, said, capsys):
    expected = AssertionError if isinstance(said, str) else said
    with pytest.raises(expected, match=said if isinstance(said, str) else None):
        Page("page").run(text)


def test_blocks_are_read_as_they_are_meant():
    text = "a\n```python\nx = 1\n```\n- b\n\n"
    text += "  ```sh\n  $ one 'two three'  # four\n  five \\\n    six\n  ```\n"
    python, shell = blocks(text)
    assert (python.language, python.code, python.line) == ("python", "x = 1\n", 3)
    assert shell.code == "$ one 'two three'  # four\nfive \\\n  six\n" and shell.line == 8
    assert list(commands(shell.code)) == [["one", "two three"], ["five", "six"]]
    text = "<!--python\ny = 2\n-->\n```python\nprint(y)\n```\n"
    text += "```text output\n2\n```\n```sh gpu\nls\n```\n"
    assert Page("page").run(text) == 3
    assert masked("a 1,234.5  ms\n-----", True) == masked("a 6 ms\n--", True)
    assert masked("in 1,234.5 ms, 3 MiB") == masked("in 6 ms, 12.5 MiB")
    assert masked("3643392 bytes") != masked("3637248 bytes"), "no other number may change"
    assert masked("a 1 model") != masked("a 2 model") and masked("1 s") != masked("1 m")
    assert alike("a 0.248, 1", "a 0.249, 1") and not alike("a 0.248", "a 0.252")
    assert not alike("a 0.248, 1", "a 0.248, 2") and not alike("a 0.2", "b 0.2")
    assert masked("a 1") != masked("b 1") and set(LANGUAGES) >= {"python", "sh"}


def test_columns_stay_columns():
    text = "Does it.\n\nx   [B, N]  what\n    it is\n\nreturns  y\n\nAnd more."
    fenced = "```text\nx   [B, N]  what\n    it is\n\nreturns  y\n```"
    assert as_markdown(text) == f"Does it.\n\n{fenced}\n\nAnd more."


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_with_every_link_good(tmp_path):
    """mkdocs.yml is strict: a page left out, or a link to nothing, is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_quiet())
    assert done.returncode == 0, done.stderr
    operators = (tmp_path / "api/operators/index.html").read_text()
    assert "bipartite soft matching" in operators.lower() and "select_diverse" in operators
    links = [link for link in _addresses(tmp_path) if link.startswith(("http:", "https:", "//"))]
    loaded = [link for link in links if "arxiv.org" not in link and "github.com" not in link]
    assert not [link for link in loaded if link.endswith((".js", ".css", ".woff2"))]


def _quiet() -> dict[str, str]:
    return os.environ | {"NO_MKDOCS_2_WARNING": "1"}


def _addresses(site: Path) -> list[str]:
    """What the front page loads or leads to."""
    return re.findall(r'(?:src|href)="?([^" >]+)', (site / "index.html").read_text())
