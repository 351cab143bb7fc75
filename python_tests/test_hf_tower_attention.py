"""Methods that read the vision tower, whichever attention it calls, and what they read there."""

import pytest
import torch
from hf_harness import assert_close, attach, forward
from naive import image_features
from test_hf_scores import seen_scores
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from restore_ext import ops
from restore_ext.hf.tower_scores import Sight, cls_attention, received_attention, received_from_all
from restore_ext.testing.models import (
    ONE_IMAGE,
    RAGGED,
    TWO_IMAGES,
    VERSION,
    make_inputs,
    tiny_model,
)

FLASH = "flash_attention_2"
# Together they hand over no mask, bounds of packed images, and, where images differ, padding.
TOWERS = ["llava", "qwen2_5_vl", "qwen3_vl", "pixtral", "idefics3", "internvl"]


def stand_in(calls: list):
    """What flash attention says, of float32, here: it has neither masks of pairs nor weights."""

    def flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert module.config._attn_implementation == FLASH  # by which its kernels are found
        mask = attention_mask
        assert mask is None or mask.dim() == 2
        N, bounds = key.shape[2], kwargs.get("cu_seq_lens_k")
        seen = torch.ones(N, N, dtype=torch.bool)
        if bounds is not None:
            image = torch.cat([torch.full((n,), i) for i, n in enumerate(bounds.diff().tolist())])
            seen = image[:, None] == image
        elif mask is not None:
            seen = mask.bool()[:, None, None]
        calls.append((None if bounds is None else len(bounds) - 1, mask))
        logits = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
        out = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value
        return out.transpose(1, 2).contiguous(), None

    return flash


def with_tower(family: str, attn: str):
    model = tiny_model(family)
    tower = getattr(model.model, "vision_tower", None) or getattr(
        model.model, "visual", getattr(model.model, "vision_model", None)
    )
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attn
    return model


@pytest.mark.parametrize("family", TOWERS)
def test_scores_are_the_same_under_flash_attention(monkeypatch, family):
    # Before, flash attention was not told where Pixtral's images end.
    alone = family == "pixtral" and VERSION < (5, 23)
    inputs, calls = make_inputs(family, ONE_IMAGE if alone else TWO_IMAGES), []
    want = seen_scores(monkeypatch, tiny_model(family), lambda m: forward(m, inputs))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FLASH, stand_in(calls))
    model = with_tower(family, FLASH)
    stock = forward(model, inputs)
    before, asked = len(calls), [bounds for bounds, _ in calls]
    got = seen_scores(monkeypatch, model, lambda m: forward(m, inputs))
    for one, other in zip(got, want, strict=True):
        assert one.allclose(other, rtol=1e-4, atol=1e-7) and other.std() > 0.05 * other.mean()
    assert torch.equal(forward(model, inputs), stock)
    if VERSION >= (5, 0):  # the watched block's call is packed like those of the others
        assert [bounds for bounds, _ in calls[before : 2 * before]] == asked
    if family in ("qwen2_5_vl", "qwen3_vl", "pixtral") and VERSION >= (5, 17) and not alone:
        assert any(bounds is not None and bounds > 1 for bounds in asked)


@pytest.mark.parametrize("method", ["vispruner", "visionzip", "token_pooling"])
def test_the_default_and_its_like_run_under_flex_attention(monkeypatch, method):
    # Not compiled, which takes a minute and changes nothing but the speed.
    monkeypatch.setattr(flex, "is_torchdynamo_compiling", lambda: True)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    # Of other pictures a last bit may decide what vispruner takes for a duplicate.
    inputs = make_inputs("llava", TWO_IMAGES, seed=1)
    stock, model = tiny_model("llava"), with_tower("llava", "flex_attention")
    with attach(stock, method=method), attach(model, method=method):
        assert_close(forward(model, inputs), forward(stock, inputs))


def test_what_is_watched_calls_the_kernel_by_its_own_name(monkeypatch):
    """A hub kernel is found by the name in the config of the module that is handed over."""
    inputs, calls = make_inputs("llava", RAGGED), []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FLASH, stand_in(calls))
    model = with_tower("llava", FLASH)
    want = image_features(model, inputs)
    attach(model, method="vispruner")
    for got, feature in zip(image_features(model, inputs), want, strict=True):
        assert torch.equal(got, feature)


def straight(query: Tensor, key: Tensor, scale: float, seen: Tensor) -> Tensor:
    """[B, N] in float64: the mean over heads, and over the queries that see a key."""
    logits = query.double() @ key.double().mT * scale
    share = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return share.mean(1).sum(1) / seen.expand(len(query), 1, -1, -1).sum(2)[:, 0].clamp(min=1)


def sights(B: int, N: int) -> dict[str, tuple[Sight, Tensor, bool]]:
    """By kind of mask: what is said, what is meant as [B or 1, 1, N or 1, N], and whether the
    operator can be told."""
    generator = torch.Generator().manual_seed(0)
    padding = torch.rand(B, N, generator=generator) > 0.3
    bounds = torch.tensor([0, N // 3, N // 3 + 1, N], dtype=torch.int32)
    image = torch.arange(3).repeat_interleave(bounds.diff())
    packed = (image[:, None] == image)[None, None]
    lowest = torch.finfo(torch.float32).min
    whole = torch.ones(1, 1, N, N, dtype=torch.bool)
    rows = padding[:, None, None].expand(B, 1, N, N)
    added = torch.zeros(1, 1, N, N).masked_fill(~packed, lowest)
    return {
        "none": (Sight.of(None, {}, N), whole, True),
        "padding": (Sight.of(padding.int(), {}, N), rows, True),
        "added": (Sight.of(torch.where(rows[:, :, :1], 0.0, lowest), {}, N), rows, True),
        "packed": (Sight.of(None, {"cu_seq_lens_k": bounds}, N), packed, True),
        "pairs": (Sight.of(packed, {}, N), packed, False),
        "pairs added": (Sight.of(added, {}, N), packed, False),
    }


@pytest.mark.parametrize("kind", sights(1, 9))
@pytest.mark.parametrize("D", [40, 24])  # the second is no head size of the operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_mean_attention_in_float64(monkeypatch, kind, D, dtype):
    B, H, N = 2, 3, 150
    generator = torch.Generator().manual_seed(D)
    query, key = (torch.randn(B, H, N, D, generator=generator).to(dtype) for _ in range(2))
    sight, seen, tellable = sights(B, N)[kind]
    asked, stock = [], ops.row_scores
    monkeypatch.setattr(ops, "row_scores", lambda q, *a, **k: asked.append(q) or stock(q, *a, **k))
    want = straight(query, key, 0.3, seen)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-2, "atol": 1e-9}
    got = received_attention(query, key, 0.3, sight)
    assert got.dtype == torch.float32 and got.double().allclose(want, **tolerance)
    assert received_from_all(query, key, 0.3, sight).equal(got[:, 1:])
    first = straight(query[:, :, :1], key, 0.3, seen[:, :, :1])
    assert cls_attention(query, key, 0.3, sight).double().allclose(first[:, 1:], **tolerance)
    assert len(asked) == (3 if tellable and D == 40 else 0)


def test_a_block_mask_says_who_sees_whom():
    B, N = 2, 150
    padding = sights(B, N)["padding"][1][:, 0, 0]
    sees = lambda b, h, q, k: padding[b, k]  # noqa: E731
    mask = torch_flex.create_block_mask(sees, B, None, N, N, device="cpu")
    seen = Sight.of(mask, {}, N).mask
    assert seen.expand(B, 1, N, N).equal(padding[:, None, None].expand(B, 1, N, N))


def test_an_unknown_mask_is_refused():
    for mask, got in ((torch.ones(4, 4, 4), r"\[4, 4, 4\]"), ("causal", "str")):
        with pytest.raises(NotImplementedError, match=rf"attention mask must be .* got {got}"):
            Sight.of(mask, {}, 4)
