"""What each method's reduction takes, beside the prefill that it saves."""

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch

from restore_ext.bench.generation import Inputs, time_answer, time_reduction, visual_tokens
from restore_ext.bench.rounds import Reading, Spread, difference, ratio, take_turns
from restore_ext.bench.table import Column, Row
from restore_ext.bench.ways import ALL_TOKENS, STOCK, Refused, Way

COLUMNS = (
    Column("way", "method", number=False),
    Column("tokens", "visual tokens"),
    Column("reduction_ms", "reduction ms", spread=True),
    Column("prefill_ms", "prefill ms", spread=True),
    Column("saved_ms", "saved ms", spread=True),
    Column("speedup", "speed-up", spread=True),
    Column("note", "", number=False),
)


def measure_prefills(
    model: Any,
    inputs: Inputs,
    ways: Sequence[Way],
    rounds: int,
    clock: Reading,
    done: Callable[[], object] = lambda: None,
) -> list[Row]:
    """A row for each way; the first is the unhooked model, which the others are held against.

    A prefill is the time to the first token, reduction and vision tower included; "saved" is the
    unhooked model's less this one, in the same round. `done` is called after each way of a round,
    of which there is one more, to warm up.
    """
    assert ways[0] is STOCK
    readings: dict[str, Reading] = {}
    rows: dict[str, Row] = {}
    spent: dict[str, list[float]] = {}
    for way in ways:
        try:
            rows[way.name] = {"way": way.name} | _warm_up(model, inputs, way, clock)
        except Refused as refusal:
            rows[way.name] = {"way": way.name, "note": f"refused: {refusal}"}
        else:
            readings[way.name] = _reading(model, inputs, way, clock, spent)
        done()
    times = take_turns(readings, rounds, done)
    for name, seen in times.items():
        rows[name] |= Spread.of(seen).columns("prefill_ms", 1e3, 1)
        if name != ALL_TOKENS:
            base = times[ALL_TOKENS]
            rows[name] |= Spread.of(spent[name]).columns("reduction_ms", 1e3, 1)
            rows[name] |= difference(base, seen).columns("saved_ms", 1e3, 1)
            rows[name] |= ratio(base, seen).columns("speedup")
    return list(rows.values())


def _warm_up(model: Any, inputs: Inputs, way: Way, clock: Reading) -> Row:
    with way.attached(model) as handle:
        time_answer(model, inputs, 0, clock)
        report = None if handle is None else handle.last
        return {"tokens": per_row(model, inputs, report)}


def per_row(model: Any, inputs: Inputs, report: Any) -> str:
    """Visual tokens of a row of the batch, whose rows are alike."""
    tokens, B = visual_tokens(model, inputs, report), len(inputs["input_ids"])
    return str(type(tokens)(*(count // B for count in astuple(tokens))))


def _reading(
    model: Any, inputs: Inputs, way: Way, clock: Reading, spent: dict[str, list[float]]
) -> Reading:
    """Seconds to the first token; `spent` learns, by a run of its own, what the reduction takes."""

    def read() -> float:
        with way.attached(model):
            first, _ = time_answer(model, inputs, 0, clock)
            if way is not STOCK:
                spent.setdefault(way.name, []).append(time_reduction(model, inputs, clock))
        return first

    return read


def repeated(inputs: Inputs, B: int) -> dict[str, torch.Tensor]:
    """The inputs of one prompt as a batch of B of them: processors put rows and pictures first."""
    return {
        name: tensor.repeat(B, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor
        for name, tensor in inputs.items()
    }
