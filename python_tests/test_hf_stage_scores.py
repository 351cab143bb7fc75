"""What a cut goes by, against attention recomputed in float64 from the weights."""

from dataclasses import dataclass

import pytest
import straight_stages
import torch
from hf_harness import each_backend, each_family, forward, naive, reduced_row
from naive import Setting
from naive_stages import attention, cuts_of, setting_of, walk
from torch import Tensor

import restore_ext
from restore_ext.testing.models import RAGGED, Picture, make_inputs, tiny_model

# Scores closer than this are float32's to order.
NEAR_TIE = 1e-6
KEEPS = {1: 9, 3: 4}  # of sparsevlm, by layer

METHODS = {
    "fastv": {"method": "fastv", "options": {"layer": 2}},
    "fastv merged": {"method": "fastv", "keep": 6, "options": {"layer": 1, "merge": True}},
    "pyramiddrop": {"method": "pyramiddrop", "options": {"layers": [1, 2, 3]}},
    "sparsevlm": {
        "method": "sparsevlm",
        "options": {"layers": [*KEEPS], "keeps": [*KEEPS.values()], "recycle": 0.9, "cluster": 3},
    },
    "chain": {"method": "vispruner", "keep": 11, "schedule": {"layers": [11, 11, 7, 2]}},
    "each its own": {"method": "fastv", "keep": [9, 4, 5, 2], "options": {"layer": 3}},
    "raters": {"schedule": {"layers": [1.0, 0.7, 0.5, 0.1], "scores": "raters"}},
}


@dataclass(frozen=True)
class Before:
    """A row before one of its cuts, as the naive model has it."""

    x: Tensor  # [T, C] what arrives at the cut
    scores: list[float]  # what every token gets by those who are asked
    images: list[list[int]]  # the tokens of each image
    members: list[list[list[int]]]  # what the cut made of each image: of every token left


def before_cuts(family: str, inputs: dict, handle, row: int) -> list[Before]:
    model, how = naive(family), Setting(**setting_of(handle))
    prompt, cuts = reduced_row(family, inputs, handle, row, how), cuts_of(handle, row)
    asks = torch.full((len(prompt),), how.distance)
    layers, _ = walk(model, prompt, asks, cuts, how)
    visual = torch.tensor(cuts[0].visual)
    behind = int(visual.nonzero()[-1]) + 1
    raters = straight_stages.raters(prompt.x[visual], prompt.x[behind:])
    found = []
    for stage, report, cut in zip(handle.settings.stages, handle.last.stages, cuts, strict=True):
        above, bias = layers[cut.layer - 1]
        x = model.layer(cut.layer - 1, above.x, above.position, bias)
        if stage.scores == "lookahead":  # the layer behind the cut, on all that arrives
            share = attention(model, cut.layer, x, above.position, bias)[-1]
        else:
            share = attention(model, cut.layer - 1, above.x, above.position, bias)
            text = [len(x) - len(prompt) + behind + t for t in raters]
            share = share[text].mean(0) if stage.scores == "raters" else share[-1]
        tokens = [i for i, is_visual in enumerate(cut.visual) if is_visual]
        images, members = [], []
        for image, count in zip(handle.last.images, report.tokens_before, strict=True):
            if image.row == row:
                images.append(tokens[:count])
                members.append([m for m in cut.members if m[0] in tokens[:count]])
                tokens = tokens[count:]
        assert not tokens
        found.append(Before(x, share.tolist(), images, members))
    return found


def too_close(scores: list[float], keep: int) -> bool:
    falling = sorted(scores, reverse=True)
    return 0 < keep < len(falling) and falling[keep - 1] - falling[keep] < NEAR_TIE


@each_family
@each_backend
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("restore", [True, False])
def test_a_cut_keeps_what_is_attended_to_most(family, backend, name, restore):
    rows = [*RAGGED, (3, Picture(6, 6), 1)]
    inputs = make_inputs(family, rows)
    model = tiny_model(family)
    handle = restore_ext.attach(model, backend=backend, restore=restore, **METHODS[name])
    forward(model, inputs)
    compared = close = 0
    for row in range(len(rows)):
        for stage, cut in zip(
            handle.last.stages, before_cuts(family, inputs, handle, row), strict=True
        ):
            for tokens, members in zip(cut.images, cut.members, strict=True):
                scores, left = [cut.scores[i] for i in tokens], len(members)
                keep = left
                if name == "sparsevlm":
                    keep = KEEPS[stage.layer]
                elif "merged" in name:
                    keep = int(handle.settings.retain * left)
                if too_close(scores, keep):
                    close += 1
                    continue
                compared += 1
                chosen = [[tokens[i]] for i in straight_stages.highest(scores, keep)]
                if name == "sparsevlm":
                    want = straight_stages.sparsevlm(scores, cut.x[tokens], keep, 0.9, 3, 5)
                    assert members == [sorted(tokens[i] for i in group) for group in want]
                elif "merged" in name:
                    assert all(choice in members for choice in chosen)
                    assert sum(map(len, members)) == len(tokens)
                else:
                    assert members == chosen
    assert compared >= 4 and close <= compared // 8
