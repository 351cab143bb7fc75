"""The transformers that the hook asks for, and how it says so."""

import importlib.util
import inspect
import subprocess
import sys

import pytest

import restore_ext
from restore_ext.hf import compat, settings
from restore_ext.reduce import reduce_tokens

INSTALL = 'pip install "transformers>=4.57.6,<6" accelerate pillow'


def load_compat():
    """compat.py anew, beside the one that the package has loaded."""
    spec = importlib.util.spec_from_file_location("compat_anew", compat.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_search_is_there_on_first_use(monkeypatch):
    searching = sys.modules.pop("restore_ext.search", None)
    monkeypatch.delattr(restore_ext, "search", raising=False)
    try:
        assert callable(restore_ext.search.find_schedule)
    finally:
        if searching is not None:  # what other tests have imported from it stays the one module
            sys.modules["restore_ext.search"] = searching
            monkeypatch.setattr(restore_ext, "search", searching)
    with pytest.raises(AttributeError, match="no attribute 'searched'"):
        _ = restore_ext.searched


def pretend(version, monkeypatch):
    # What a first `import transformers` binds may be another module, without its lazy names.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)


@pytest.mark.parametrize("version", ["4.56.2", "4.57.5", "4.57.5.post1", "3.0"])
def test_an_older_transformers_is_refused_with_what_to_install(version, monkeypatch):
    pretend(version, monkeypatch)
    with pytest.raises(ImportError, match=rf"4\.57\.6 or newer, got {version}: ") as caught:
        load_compat()
    assert str(caught.value).endswith(INSTALL)


@pytest.mark.parametrize(
    ("version", "carries"),
    [
        ("4.57.6", False),
        ("4.58.0", False),
        ("5.2.1", False),
        ("5.3.0.dev0", True),
        ("5.23.0", True),
    ],
)
def test_a_newer_transformers_is_taken(version, carries, monkeypatch):
    pretend(version, monkeypatch)
    assert load_compat().GENERATE_CARRIES_POSITIONS is carries


def test_without_transformers_the_error_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import restore_ext; restore_ext.attach"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and INSTALL in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("entry", [restore_ext.attach, restore_ext.prepare_inputs])
def test_the_defaults_are_decided_in_one_place(entry):
    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    ours, theirs = defaults(entry), defaults(reduce_tokens)
    for name in ("method", "retain", "anchor_mode", "restore", "seed"):
        assert ours[name] == theirs[name]
    assert ours["layer0"] == settings.DEFAULT_LAYER0
