"""The table of methods: complete, and the page what the methods say."""

import pytest

import restore_ext
from restore_ext.cli import main
from restore_ext.methods import METHODS, TOWER_METHODS, Card, Method, cards, list_methods
from restore_ext.methods.catalogue import as_markdown
from restore_ext.testing.models import tiny_model
from tools import methods_page


def test_the_page_is_what_the_methods_say():
    methods_page.main(["--check"])


def test_a_page_that_is_not_is_found_and_written(monkeypatch, tmp_path):
    page = tmp_path / "methods.md"
    page.write_text("above\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nbelow\n")
    monkeypatch.setattr(methods_page, "PAGE", page)
    with pytest.raises(SystemExit, match=r"python -m tools\.methods_page"):
        methods_page.main(["--check"])
    assert "old" in page.read_text()
    methods_page.main([])
    methods_page.main(["--check"])
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert all(f"| `{name}` |" in text for name in list_methods())


def test_the_list_is_what_attach_takes():
    assert restore_ext.list_methods() == list_methods() == [*METHODS, *TOWER_METHODS]
    assert len(set(list_methods())) == len(list_methods())
    model = tiny_model("llava")
    for name in list_methods():
        restore_ext.attach(model, method=name, keep=20).detach()
    with pytest.raises(ValueError, match=r"method must be one of random, .*downsample.*'all'"):
        restore_ext.attach(model, method="all", keep=20)


def test_a_card_says_what_its_method_is():
    by_name = {card.name: card for card in cards()}
    for name, needs, does, restore in (
        ("random", "", "picks", "anchors, positions, calibration"),
        ("vispruner", "CLS attention, tower features", "picks", "anchors, positions, calibration"),
        ("token_pooling", "attention received", "merges", "positions, calibration"),
        ("downsample", "", "neither", "nothing"),
    ):
        card = by_name[name]
        assert (card.needs, card.does, card.restore) == (needs, does, restore)
    assert by_name["visionzip"].needs == "CLS attention, keys"
    assert by_name["visionzip"].does == "picks and merges"
    assert by_name["visionzip"].restore.startswith("anchors, positions, calibration; ")
    made = Card.of("mine", Method(lambda *_: None, source="1234.56789", about="what it does"))
    assert "| `mine` | after the projector | what it does | picks |" in as_markdown([made])
    assert "[1234.56789](https://arxiv.org/abs/1234.56789)" in as_markdown([made])


def test_the_command_prints_every_method(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list_methods()
