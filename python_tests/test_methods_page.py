"""The table of methods: complete, and what the methods say of themselves."""

import re

import pytest
import torch

import restore_ext
from restore_ext.cli import main
from restore_ext.methods import (
    METHODS,
    TOWER_METHODS,
    Card,
    Method,
    cards,
    find_card,
    list_methods,
)
from restore_ext.methods.catalogue import as_markdown
from restore_ext.stages import STAGE_METHODS, Request
from restore_ext.testing.models import tiny_model


def test_the_list_is_what_attach_takes():
    assert (
        restore_ext.list_methods() == list_methods() == [*METHODS, *TOWER_METHODS, *STAGE_METHODS]
    )
    assert len(set(list_methods())) == len(list_methods())
    model = tiny_model("llava")
    for name in list_methods():
        budget = {} if name in STAGE_METHODS and not STAGE_METHODS[name].budget else {"keep": 20}
        options = {"layers": [20, 20, 10, 5]} if name == "schedule" else {}
        restore_ext.attach(model, method=name, options=options, **budget).detach()
    with pytest.raises(ValueError, match=r"method must be one of random, .*downsample.*'all'"):
        restore_ext.attach(model, method="all", keep=20)


def test_a_card_says_what_its_method_is():
    by_name = {card.name: card for card in cards()}
    for name, needs, does, restore in (
        ("random", "", "picks", "anchors, positions, calibration"),
        ("vispruner", "CLS attention, tower features", "picks", "anchors, positions, calibration"),
        ("token_pooling", "attention received", "merges", "positions, calibration"),
        ("downsample", "", "neither", "nothing"),
        ("vtw", "", "drops all", "nothing"),
        (
            "fastv",
            "attention of the prompt's last token",
            "picks",
            "calibration of what is left",
        ),
    ):
        card = by_name[name]
        assert (card.needs, card.does, card.restore) == (needs, does, restore)
        assert card.restores == (restore != "nothing") and find_card(name) == card
    assert by_name["visionzip"].needs == "CLS attention, keys"
    assert by_name["visionzip"].does == "picks and merges"
    assert by_name["visionzip"].restore.startswith("anchors, positions, calibration; ")
    made = Card.of("mine", Method(lambda *_: None, source="1234.56789", about="what it does"))
    assert "| `mine` | after the projector | what it does | picks |" in as_markdown([made])
    assert "[1234.56789](https://arxiv.org/abs/1234.56789)" in as_markdown([made])


def test_a_card_of_the_language_model_says_what_its_stages_do():
    """Needs, RESTORE's part and the budget, told from what the stages are."""
    for name, method in STAGE_METHODS.items():
        card, options = find_card(name), {"layers": [9, 9, 9, 5]} if name == "schedule" else {}
        stages = method.make(Request(4, None, None, 0.5, "paper"), **options)
        scored = stages[0].scores != "none"
        assert card.place == "inside the language model" and card.about
        assert re.fullmatch(r"\d{4}\.\d{5}", card.source)
        assert bool(card.needs) == scored
        assert card.does == ("picks and merges" if stages[0].merges else card.does)
        assert (card.does == "drops all") == (stages[0].counts(9, 9)[0] == 0)
        assert card.restores == (card.does != "drops all") and card.budget == method.budget
        assert ("positions" in card.restore) == method.reindexes
        assert method.make.__doc__ and (name == "schedule" or card.source in method.make.__doc__)
        with pytest.raises(ValueError, match=f"{name} acts inside the language model, so attach"):
            restore_ext.reduce_tokens(torch.zeros(1, 4, 2), keep=2, method=name)
    with pytest.raises(ValueError, match=r"method must be one of .*schedule, got 'all'"):
        find_card("all")


def test_the_command_prints_every_method(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list_methods()
