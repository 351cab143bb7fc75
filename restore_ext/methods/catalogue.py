"""The table of methods: what each needs, does, and what RESTORE means there."""

from collections.abc import Iterable
from dataclasses import dataclass

from restore_ext.methods.problem import (
    CLS,
    FEATURES,
    INSIDE,
    KEYS,
    PICTURE,
    RECEIVED,
    TOWER_FEATURES,
    Method,
)
from restore_ext.stages import StageMethod
from restore_ext.text import aligned

# What RESTORE means for a method, see Card.restore.
NOTHING = "nothing"
MERGER = "positions, calibration"
PRUNER = "anchors, positions, calibration"

_SCORES = {CLS: "CLS attention", RECEIVED: "attention received"}
_METRICS = {FEATURES: "features", TOWER_FEATURES: "tower features", KEYS: "keys"}


@dataclass(frozen=True)
class Card:
    """What the table says of a method, wherever it acts."""

    name: str
    place: str  # one of problem.py's, or another
    does: str  # picks, merges, or another
    needs: str  # beyond the tokens themselves
    restore: str  # what RESTORE adds
    about: str
    source: str | None  # number on arXiv
    budget: bool = True  # whether it takes keep and keep_ratio

    @property
    def restores(self) -> bool:
        """Whether RESTORE has anything to add."""
        return self.restore != NOTHING

    @staticmethod
    def of(name: str, method: Method) -> "Card":
        needs = [_SCORES[method.scores]] if method.scores is not None else []
        if method.metric != FEATURES:
            needs.append(_METRICS[method.metric])
        return Card(
            name=name,
            place=method.place,
            does=_does(method),
            needs=", ".join(needs),
            restore=_restore(method),
            about=method.about,
            source=method.source,
        )


def inside(name: str, method: StageMethod) -> Card:
    """The card of a method that cuts inside the language model."""
    return Card(
        name=name,
        place=INSIDE,
        does=method.does,
        needs=method.needs,
        restore=method.restore,
        about=method.about,
        source=method.source,
        budget=method.budget,
    )


def _does(method: Method) -> str:
    if method.place == PICTURE:
        return "neither"
    if method.select is None:
        return "merges"
    return "picks" if method.merge is None else "picks and merges"


def _restore(method: Method) -> str:
    if not method.restores:
        return NOTHING
    if method.select is None:
        return MERGER
    return PRUNER if method.merge is None else f"{PRUNER}; anchors replace its own merging"


def as_markdown(cards: Iterable[Card]) -> str:
    """The table of docs/methods.md."""
    titles = ("method", "acts", "keeps", "does", "needs", "RESTORE adds", "source")
    rows = [titles, ("---",) * len(titles)]
    for card in cards:
        link = f"[{card.source}](https://arxiv.org/abs/{card.source})" if card.source else ""
        cells = (card.place, card.about, card.does, card.needs, card.restore, link)
        rows.append((f"`{card.name}`", *cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_text(cards: Iterable[Card]) -> str:
    """The same for a terminal, aligned."""
    rows = [("method", "acts", "does", "needs", "RESTORE adds", "arXiv")]
    for card in cards:
        rows.append((card.name, card.place, card.does, card.needs, card.restore, card.source or ""))
    return aligned(rows, [False] * len(rows[0]))
