"""Which tokens a cut keeps on every family: those that stock's eager attention looks at most."""

from functools import cache

import pytest
import torch
from family_checks import model, row_inputs
from hf_harness import forward
from torch import Tensor

import restore_ext
from restore_ext.testing.models import TINY, Picture, tiny_model

each = pytest.mark.parametrize("family", sorted({*TINY} - {"llava_onevision_several"}))
ROW = (5, Picture(8, 8), 3, Picture(6, 8), 7)
LAYER, KEEP = 3, 0.3  # behind all of Qwen3-VL's DeepStack
ROUNDING = 1e-4


@cache
def stock_attention(family: str) -> tuple[dict, list[Tensor]]:
    """One row, and of every layer what its last token attends to, [S], averaged over heads."""
    [inputs] = row_inputs(family, [ROW])
    with torch.no_grad():
        out = tiny_model(family, attn="eager")(**inputs, output_attentions=True)
    return inputs, [layer[0].mean(0)[-1] for layer in out.attentions]


@each
@pytest.mark.parametrize("kind", ["attention", "lookahead"])
def test_a_cut_keeps_what_the_last_token_attends_to_most(family, kind):
    """`attention` goes by the layer before the cut; `lookahead`, by the one behind it, which turns
    queries and keys by its own RoPE and caps its logits before it has run."""
    inputs, attention = stock_attention(family)
    asked = {"layers": [1.0] * LAYER + [KEEP] * (4 - LAYER), "scores": kind}
    options = {"restore": False, "positions": "original"}
    with restore_ext.attach(model(family), schedule=asked, **options) as handle:
        forward(model(family), inputs)
    [stage], plan = handle.last.stages, handle.last.plan
    left = set(plan.source[0, stage.plan.source[0]].tolist())
    visual = plan.source[0, plan.is_visual[0]].tolist()
    row = attention[LAYER if kind == "lookahead" else LAYER - 1]
    apart = 0.0  # what is out of a window is seen alike: not at all
    for before, after in zip(stage.tokens_before, stage.tokens_after, strict=True):
        tokens, visual = visual[:before], visual[before:]
        assert 0 < after < before
        stays = torch.tensor([token in left for token in tokens])
        seen = row[tokens]
        assert stays.sum() == after
        assert seen[stays].min() >= (1 - ROUNDING) * seen[~stays].max()
        apart = max(apart, (seen[stays].mean() / seen.mean()).item())
    assert not visual and apart > 1.2
