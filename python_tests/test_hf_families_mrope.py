"""Qwen2-VL, Qwen3-VL and GLM-4V: what only they have. Scores, DeepStack, RoPE."""

import pytest
import torch
from family_checks import (
    MROPE,
    dense,
    model,
    row_inputs,
)
from hf_harness import attach, generate, logits
from naive import Setting
from test_hf_scores import seen_scores

import restore_ext
from restore_ext.testing.models import (
    RAGGED,
    TWO_IMAGES,
    Picture,
    image_tokens,
    make_inputs,
)

each = pytest.mark.parametrize("family", MROPE)


@each
@pytest.mark.parametrize("rows", [TWO_IMAGES, [*RAGGED, (3, Picture(4, 6), 2)]])
def test_scores_are_the_mean_attention_received_in_the_last_block(monkeypatch, family, rows):
    inputs = make_inputs(family, rows)
    got = seen_scores(monkeypatch, model(family), lambda m: m(**inputs))
    with torch.no_grad():
        want = received(model(family), inputs)
    assert len(got) == len(want)
    for scores, truth in zip(got, want, strict=True):
        assert scores.allclose(truth, rtol=0, atol=1e-6)


def received(stock, inputs: dict) -> list[torch.Tensor]:
    """From the last block's weights: softmax over each image's own patches, mean over the four of
    a token."""
    tower = stock.model.visual
    block = tower.blocks[-1].attn
    caught = {}

    def catch(_, args, options):
        caught["x"] = args[0] if args else options["hidden_states"]
        caught["cos"], caught["sin"] = options["position_embeddings"]

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    hook.remove()
    q, k, _ = block.qkv(caught["x"]).unflatten(-1, (3, block.num_heads, -1)).permute(1, 2, 0, 3)
    q, k = (x * caught["cos"] + _turned(x) * caught["sin"] for x in (q, k))
    scores, first = [], 0
    for tokens in image_tokens(inputs):
        mine = slice(first, first + 4 * tokens)
        share = (q[:, mine] @ k[:, mine].mT / q.shape[-1] ** 0.5).softmax(-1)
        scores.append(share.mean((0, 1)).view(-1, 4).mean(-1))
        first += 4 * tokens
    return scores


def _turned(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def test_deepstack_reaches_the_tokens_that_are_left():
    """Without what is added in the first layers the reference would be another."""
    [inputs] = row_inputs("qwen3_vl", TWO_IMAGES)
    with attach(model("qwen3_vl")) as handle:
        out = generate(model("qwen3_vl"), inputs)
    full = dense("qwen3_vl").prompt(inputs)
    assert len(full.added) == 2 and all(x[full.visual].abs().min() > 0 for x in full.added)
    full.added = [torch.zeros_like(x) for x in full.added]
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    without = dense("qwen3_vl").logits(full, handle.last.plan, 0, tokens, Setting())
    assert (logits(out)[0] - without).abs().max() > 0.1


def test_prepared_inputs_cannot_carry_deepstack():
    with pytest.raises(NotImplementedError, match=r"prepare_inputs.*attach\(\)"):
        restore_ext.prepare_inputs(model("qwen3_vl"), **make_inputs("qwen3_vl"), keep_ratio=0.3)
