"""Accuracy of the built-in model on held-out questions, for every way of reducing its tokens.

One question a scene, so that questions are independent; every configuration answers the same ones,
so that differences are paired. An answer is the first word after the prompt, right or wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restore_ext.methods import METHODS, TOWER_METHODS
from restore_ext.methods.problem import TOWER
from restore_ext.pocket.model import encode
from restore_ext.pocket.scenes import ID, held_out
from restore_ext.pocket.shared import shared_work

BUDGETS = (192, 128, 64)
ABLATION_BUDGETS = (192, 64)
ABLATION_METHODS = ("divprune", "vispruner")
MAIN_BUDGETS, MAIN_METHODS = (192, 64), ("random", "divprune", "vispruner", "tome", "downsample")
# What attach() is asked for, spelled out: its defaults follow from this table, not it from them.
PLAIN = {"restore": False, "positions": "reindex", "calibrate": "none"}
RESTORE = {
    "restore": True,
    "positions": "original",
    "calibrate": "size+distance",
    "layer0": "uniform",
    "retain": 0.5,
    "anchor_mode": "paper",
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "paper": RESTORE,
    "official": {**RESTORE, "anchor_mode": "official"},
    "layer0-size": {**RESTORE, "layer0": "size"},
}
STEPS: dict[str, dict[str, Any]] = {  # of the ablation
    "positions": {**PLAIN, "positions": "original"},
    "merge": {**RESTORE, "positions": "reindex", "calibrate": "none"},
    "merge+positions": {**RESTORE, "calibrate": "none"},
    "merge+positions+size": {**RESTORE, "calibrate": "size"},
    "uniform-anchors": {**RESTORE, "anchor_mode": "uniform"},
}
KEPT_POSITIONS = {**PLAIN, "positions": "original"}  # as FastV has it, and the two without scores
# Inside the language model a budget is not what all layers see (docs/pocket.md). The model has four
# layers; SparseVLM's three cuts, scaled to that, would be two.
SPARSEVLM_LAYERS = [1, 2, 3]
SCHEDULES = {keep: [576, (2 * 576 + keep) // 3, (576 + 2 * keep) // 3, keep] for keep in BUDGETS}

Right = dict[str, list[bool]]  # configuration -> question by question, was the answer right


@dataclass(frozen=True)
class Configuration:
    """A name and what attach() is given; no options: all tokens, nothing attached."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def configurations() -> list[Configuration]:
    """Everything the tables show, named "full" or METHOD/BUDGET/WAY."""
    named = []
    for method, what in (METHODS | TOWER_METHODS).items():
        for keep in BUDGETS:
            here = {**WAYS} if what.restores else {"plain": PLAIN}
            if what.select is None:
                here.pop("official", None)  # it merges by itself: it has no anchors
            if method in ABLATION_METHODS and keep in ABLATION_BUDGETS:
                here |= STEPS
            for way, options in here.items():
                given = {"method": method, "keep": keep, **options}
                named.append(Configuration(f"{method}/{keep}/{way}", given))
    return [Configuration("full"), *named, *_inside()]


def _inside() -> list[Configuration]:
    """Those that cut inside the language model: ways "plain", as published, and "calibrated", with
    RESTORE; "merged" and "dropped" where merging is not what the method does otherwise."""
    named: list[Configuration] = []

    def ask(cell: str, way: str, method: str, how: dict[str, Any], **given: Any) -> None:
        named.append(Configuration(f"{method}/{cell}/{way}", {"method": method, **given, **how}))

    for keep in BUDGETS:
        asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("fastv", KEPT_POSITIONS, {"keep": keep}),
            ("pyramiddrop", PLAIN, {"keep": keep}),
            ("sparsevlm", PLAIN, {"keep": keep, "options": {"layers": SPARSEVLM_LAYERS}}),
            ("schedule", KEPT_POSITIONS, {"options": {"layers": SCHEDULES[keep]}}),
        ]
        for method, plain, given in asked:
            ask(str(keep), "plain", method, plain, **given)
            ask(str(keep), "calibrated", method, RESTORE, **given)
            merge = method != "sparsevlm"
            given["options"] = {**given.get("options", {}), "merge": merge}
            ask(str(keep), "merged" if merge else "dropped", method, RESTORE, **given)
    ask("layer2", "plain", "vtw", KEPT_POSITIONS, options={"layer": 2})
    for way, how in (("plain", KEPT_POSITIONS), ("calibrated", RESTORE)):
        ask("stride2", way, "adsc_style", how, options={"layers": [1, 2], "stride": 2})
    return named


def main_configurations() -> list[Configuration]:
    """Those that say the most, for a look: some methods plain and with RESTORE, on few tokens."""
    cells = [f"{method}/{keep}" for keep in MAIN_BUDGETS for method in MAIN_METHODS]
    names = {"full"} | {f"{cell}/{way}" for cell in cells for way in ("plain", "paper")}
    return [c for c in configurations() if c.name in names]


@dataclass(frozen=True)
class Batch:
    """Held-out questions start..stop-1, and the configurations they are still to be asked under."""

    start: int
    stop: int
    todo: list[Configuration]


def plan(
    questions: int, chosen: Sequence[Configuration], right: Right, batch: int = 64
) -> list[Batch]:
    """What is left to ask of held-out questions 0..questions-1, `batch` scenes at a time."""
    batches = []
    for start in range(0, questions, batch):
        stop = min(start + batch, questions)
        todo = [c for c in chosen if len(right.get(c.name, [])) < stop]
        batches.append(Batch(start, stop, todo))
    return batches


def answer(model: Any, processor: Any, batch: Batch, backend: str = "op") -> Right:
    """Asks one batch under each of its configurations."""
    import restore_ext

    scenes = [held_out(index) for index in range(batch.start, batch.stop)]
    wanted = [ID[scene.question.answer] for scene in scenes]
    right: Right = {}
    inputs = encode(processor, [s.image for s in scenes], [s.question.text for s in scenes])

    def ask(c: Configuration) -> None:
        if c.options:
            with restore_ext.attach(model, backend=backend, **c.options):
                words = first_words(model, inputs)
        else:
            words = first_words(model, inputs)
        right[c.name] = [w == a for w, a in zip(words, wanted, strict=True)]

    with torch.no_grad():
        with shared_work(model):
            for c in batch.todo:
                if not _in_tower(c):
                    ask(c)
        for c in batch.todo:
            if _in_tower(c):  # hooks in blocks, which may not be left out
                ask(c)
    return right


def _in_tower(c: Configuration) -> bool:
    method = c.options.get("method")
    return method in TOWER_METHODS and TOWER_METHODS[method].place == TOWER


def add(right: Right, batch: Batch, answers: Right) -> None:
    """Puts a batch's answers behind those of the batches before it; what is there already stays."""
    for name, fresh in answers.items():
        known = right.setdefault(name, [])
        known.extend(fresh[len(known) - batch.start :])


def first_words(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """The id of the likeliest first word of every row's answer."""
    return model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()


def kinds(questions: int) -> list[str]:
    """The kind of every held-out question."""
    return [held_out(index).question.kind for index in range(questions)]


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95 % interval (normal)."""

    mean: float
    half: float


def accuracy(right: Sequence[bool]) -> Estimate:
    return estimate([float(r) for r in right])


def difference(right: Sequence[bool], base: Sequence[bool]) -> Estimate:
    """Accuracy minus accuracy of `base`, question by question."""
    return estimate([float(r) - float(b) for r, b in zip(right, base, strict=True)])


def pooled(right: Right, way: str, base: str) -> Estimate | None:
    """Accuracy under `way` minus under `base`, over all methods and budgets that have both.

    The values averaged are the questions' own means: answers to one question are not independent.
    """
    cells = [name.removesuffix(f"/{way}") for name in right if name.endswith(f"/{way}")]
    pairs = [(right[f"{c}/{way}"], right[f"{c}/{base}"]) for c in cells if f"{c}/{base}" in right]
    if not pairs:
        return None
    better = np.array([w for w, _ in pairs], dtype=float).mean(0)
    return estimate((better - np.array([b for _, b in pairs], dtype=float).mean(0)).tolist())


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values that are independent of each other."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / max(n - 1, 1)
    return Estimate(mean, 1.96 * sqrt(variance / n))
