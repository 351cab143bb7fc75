"""Cuts inside the language model: a cached generate() is the naive, cache-free model."""

import pytest
import torch
from hf_harness import (
    answers,
    assert_close,
    beam_rows,
    each_backend,
    each_family,
    forward,
    generate,
    logits,
    step,
    stock,
)
from naive_stages import expected, setting_of

import restore_ext
from restore_ext.hf import generation
from restore_ext.testing.models import (
    EOS,
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    Picture,
    image_tokens,
    make_inputs,
    single_row,
    tiny_model,
)

STAGED = {
    "fastv": {"method": "fastv", "keep": 5, "options": {"layer": 1}},
    "fastv merge": {"method": "fastv", "keep": 5, "options": {"merge": True}},
    "two cuts": {"method": "pyramiddrop", "options": {"layers": [1, 3], "ratios": [0.5, 0.1]}},
    "clusters": {"method": "sparsevlm", "options": {"layers": [1, 2, 3], "keeps": [12, 6, 3]}},
    "drop all": {"method": "vtw"},
    "strides": {"method": "adsc_style", "options": {"layers": [1, 3], "stride": 3, "offset": 1}},
    "chain": {
        "method": "vispruner",
        "keep": 12,
        "schedule": {"layers": [12, 12, 8, 3], "scores": "lookahead", "merge": True},
    },
    "chain to nothing": {
        "method": "tome",
        "keep": 12,
        "layer0": "uniform",
        "schedule": {"layers": [1.0, 0.5, None, 0.0], "scores": "none"},
    },
}
each_kind = pytest.mark.parametrize("kind", STAGED)
some_kinds = pytest.mark.parametrize("kind", ["two cuts", "clusters", "chain to nothing"])


def attached(family: str, kind: str, **options):
    model = tiny_model(family)
    return model, restore_ext.attach(model, **{**STAGED[kind], **options})


def assert_is_naive(family: str, inputs: dict, handle, out) -> None:
    assert handle.last.stages
    for row, tokens in enumerate(answers(out, inputs)):
        want = expected(family, inputs, handle, tokens, row, **setting_of(handle))
        assert_close(logits(out)[row], want)


@each_family
@each_backend
@each_kind
def test_every_kind_of_cut_is_the_naive_model(family, backend, kind):
    """Rows of different lengths, one of them with two images; with RESTORE where the op runs."""
    inputs = make_inputs(family, RAGGED)
    model, handle = attached(family, kind, backend=backend, restore=backend == "op")
    assert_is_naive(family, inputs, handle, generate(model, inputs, max_new_tokens=3))


@each_family
@some_kinds
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "op", "restore": False},
        {"backend": "mask", "restore": True, "decode_distance": True},
        {"backend": "op", "calibrate": "size", "layer0": "uniform"},
    ],
    ids=["plain", "decode_distance", "size"],
)
def test_every_calibration_is_the_naive_model(family, kind, options):
    inputs = make_inputs(family, ONE_IMAGE)
    model, handle = attached(family, kind, **options)
    assert_is_naive(family, inputs, handle, generate(model, inputs, max_new_tokens=3))


@pytest.mark.parametrize("kind", ["fastv merge", "two cuts", "chain"])
@pytest.mark.parametrize("restore", [True, False])
def test_reindexed_positions_are_counted_anew_at_every_cut(kind, restore):
    inputs = make_inputs("llava", RAGGED)
    model, handle = attached("llava", kind, positions="reindex", restore=restore)
    assert_is_naive("llava", inputs, handle, generate(model, inputs, max_new_tokens=3))


@each_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_both_stock_attentions_are_the_naive_model(family, attn):
    inputs = make_inputs(family, TWO_IMAGES)
    model = tiny_model(family, attn=attn)
    handle = restore_ext.attach(model, **STAGED["two cuts"], backend="mask")
    assert_is_naive(family, inputs, handle, generate(model, inputs, max_new_tokens=2))


@each_family
@some_kinds
def test_a_ragged_batch_equals_its_rows(family, kind):
    inputs = make_inputs(family, RAGGED)
    model, handle = attached(family, kind)
    together = generate(model, inputs, max_new_tokens=3)
    visual = handle.last.layers[-1].visual
    alone = []
    for row in range(2):
        one = single_row(inputs, row)
        out = generate(model, one, max_new_tokens=3)
        assert_close(logits(together)[row], logits(out)[0])
        alone += handle.last.layers[-1].visual
    assert visual == alone


@each_family
def test_a_row_without_a_cut_is_stock_beside_one_that_has(family):
    inputs = make_inputs(family, [(5, Picture(8, 12), 7), (11,)])
    model = tiny_model(family)
    restore_ext.attach(model, method="fastv", keep=5)
    out = generate(model, inputs)
    assert_close(logits(out)[1], logits(generate(stock(family), single_row(inputs, 1)))[0])


@each_backend
def test_an_image_within_its_budget_is_whole_beside_one_that_is_not(backend):
    inputs = make_inputs("qwen2_5_vl", RAGGED)  # of 24, 16 and 15 tokens
    model = tiny_model("qwen2_5_vl")
    handle = restore_ext.attach(model, method="fastv", keep=16, backend=backend)
    out = generate(model, inputs, max_new_tokens=2)
    assert handle.last.layers[-1].visual == [16, 16, 15]
    assert_is_naive("qwen2_5_vl", inputs, handle, out)


@each_family
@each_backend
@each_kind
def test_where_nothing_is_cut_the_bits_are_those_of_stock(family, backend, kind):
    inputs, text = make_inputs(family, TWO_IMAGES), make_inputs(family, TEXT_ONLY)
    model, handle = attached(family, kind, backend=backend)
    want, said = forward(stock(family), inputs), forward(stock(family), text)
    assert torch.equal(forward(model, text), said)
    assert handle.last is None
    handle.enabled = False
    assert torch.equal(forward(model, inputs), want)
    handle.enabled = True
    assert not torch.equal(forward(model, inputs)[:, -1], want[:, -1])
    handle.detach()
    assert torch.equal(forward(model, inputs), want)
    longest = max(image_tokens(inputs))
    handle = restore_ext.attach(model, method="fastv", keep=longest, backend=backend)
    assert torch.equal(forward(model, inputs), want)
    assert handle.last is None


@each_family
@each_kind
def test_the_report_says_what_is_left_and_what_the_cache_holds(family, kind):
    inputs = make_inputs(family, RAGGED)
    model, handle = attached(family, kind)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    report, layers = handle.last, out.past_key_values.layers
    assert [r.tokens_after for r in report.layers] == [c.keys.shape[-2] for c in layers]
    held = [c.keys.nbytes + c.values.nbytes for c in layers]
    assert [r.kv_bytes for r in report.layers] == held and sum(held) == report.kv_bytes
    assert report.kv_bytes < report.kv_bytes_stock
    assert {c.get_seq_length() for c in layers} == {inputs["input_ids"].shape[1]}
    assert out.logits.shape[1] == report.layers[-1].tokens_after == report.source.shape[1]
    row_of = [image.row for image in report.images]
    last = report.stages[-1].plan
    for row in range(2):
        mine = [n for n, r in zip(report.layers[-1].visual, row_of, strict=True) if r == row]
        assert last.is_visual[row].sum() == sum(mine)
        kept = report.source[row, last.valid[row] & ~last.is_visual[row]]
        assert not (inputs["input_ids"][row, kept] == model.config.image_token_id).any()
    for stage in report.stages:
        assert report.layers[stage.layer].visual == stage.tokens_after
        assert report.layers[stage.layer - 1].visual == stage.tokens_before


@each_family
@pytest.mark.parametrize("kind", ["clusters", "chain", "fastv merge"])
def test_sizes_are_conserved_by_what_merges(family, kind):
    inputs = make_inputs(family, RAGGED)
    options = {"recycle": 1.0} if kind == "clusters" else {}
    staged = {**STAGED[kind]}
    staged["options"] = {**staged.get("options", {}), **options}
    model = tiny_model(family)
    handle = restore_ext.attach(model, **staged)
    forward(model, inputs)
    for stage in handle.last.stages:
        plan = stage.plan
        for row in range(2):
            image = [i for i in handle.last.images if i.row == row]
            assert plan.size[row, plan.is_visual[row]].sum() == sum(i.tokens_before for i in image)
        assert plan.size[~plan.is_visual].eq(1).all()


@each_family
@some_kinds
def test_beams_are_scored_as_by_the_naive_model(family, kind):
    inputs = make_inputs(family, beam_rows(family))
    model, handle = attached(family, kind)
    out = generate(model, inputs, num_beams=2, output_scores=True, max_new_tokens=3)
    for row, tokens in enumerate(answers(out, inputs)):
        setting = setting_of(handle)
        logprob = expected(family, inputs, handle, tokens, row, **setting).log_softmax(-1)
        score = logprob[torch.arange(3), tokens].mean()
        assert abs(score - out.sequences_scores[row]) < 1e-5


@each_family
@some_kinds
def test_drafts_are_verified_as_if_said_one_by_one(family, kind):
    inputs = make_inputs(family)
    model, _ = attached(family, kind, decode_distance=kind == "clusters")
    model.generation_config.eos_token_id = EOS
    greedy = generate(model, inputs, max_new_tokens=12)
    out = generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=4)
    assert torch.equal(out.sequences, greedy.sequences)
    assert_close(logits(out), logits(greedy))


@each_family
@some_kinds
@each_backend
def test_drafts_behind_the_prompt_do_not_rate_and_are_not_cut(family, kind, backend):
    """The first forward of assisted decoding may bring a draft with the images."""
    inputs = make_inputs(family)
    model, handle = attached(family, kind, backend=backend)
    out = generate(model, inputs, max_new_tokens=4)
    said = answers(out, inputs)
    want = [stage.plan for stage in handle.last.stages]
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], said[:, :3]], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(said[:, :3])], 1)
    token = generation._DRAFT.set((longer["input_ids"].shape[1], 3))
    try:
        got = forward(model, longer)
    finally:
        generation._DRAFT.reset(token)
    for stage, plan in zip(handle.last.stages, want, strict=True):
        T = plan.source.shape[1]
        assert torch.equal(stage.plan.source[:, :T], plan.source)
    assert_close(got[0, -4:], logits(out)[0])


@each_family
@some_kinds
def test_several_tokens_on_the_cache_can_be_taken_back(family, kind):
    inputs = make_inputs(family)
    model, handle = attached(family, kind)
    logical = inputs["input_ids"].shape[1]
    draft = torch.tensor([[17, 40, 5, 99]])
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    past = step(model, draft.flip(1), past, logical).past_key_values
    past.crop(-4)
    assert past.get_seq_length() == logical
    got = step(model, draft, past, logical).logits[0]
    tokens = torch.cat([draft[0], draft[0, :1]])
    want = expected(family, inputs, handle, tokens, **setting_of(handle))
    assert_close(got, want[1:])


@each_family
@each_kind
def test_without_a_cache_a_prompt_says_the_same(family, kind):
    inputs = make_inputs(family, RAGGED)
    model, handle = attached(family, kind)
    with_cache = forward(model, inputs, use_cache=True)
    assert torch.equal(forward(model, inputs, use_cache=False), with_cache)
    assert handle.last.stages


@each_family
def test_a_token_left_alone_keeps_its_bits_and_clusters_are_weighted_means(family):
    """Of tokens that stand for several already, in a dtype that the operators do not have."""
    inputs = make_inputs(family, RAGGED)
    model, handle = attached(family, "chain")
    forward(model, inputs)
    before = handle.last.plan
    for stage in handle.last.stages:
        plan = stage.plan
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*plan.assign.shape, 7, generator=generator, dtype=torch.float64)
        short = plan.shorten(x)
        alone = clusters = 0
        for row, column in plan.valid.nonzero().tolist():
            members = (plan.assign[row] == column).nonzero().flatten()
            weight = before.size[row, members].double()
            assert plan.size[row, column] == weight.sum()
            if len(members) == 1:
                alone += int(weight) > 1
                assert torch.equal(short[row, column], x[row, members[0]])
            else:
                clusters += 1
                mean = (weight[:, None] * x[row, members]).sum(0) / weight.sum()
                assert torch.allclose(short[row, column], mean, atol=1e-6)
        assert alone and clusters
        before = plan
