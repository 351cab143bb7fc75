"""Cuts inside the language model over a conversation, in training, and where VTW should cut."""

from dataclasses import replace

import pytest
import straight_stages
import torch
from hf_harness import (
    assert_close,
    each_backend,
    each_family,
    forward,
    naive,
    reduced_row,
    step,
    stock,
)
from naive import Setting, image_features, window_order
from naive_stages import Cut, attention, cuts_of, expected, said, setting_of, walk
from test_hf_stages import attached, some_kinds
from test_hf_training import projector

import restore_ext
from restore_ext.hf import images
from restore_ext.hf import step as hf_step
from restore_ext.testing.models import RAGGED, TEXT_ONLY, Picture, make_inputs, tiny_model


def both_turns(first: list[Cut], told: int, second: list[Cut]) -> list[Cut]:
    """The cuts of a conversation of two prompts with `told` tokens of an answer in between."""
    cuts = []
    behind = len(second[0].visual)
    for one, other in zip(first, second, strict=True):
        cuts.append(one.with_text(0, told + behind))
        cuts.append(other.with_text(len(one.members) + told, 0))
        behind = len(other.members)
    return cuts


def assert_goes_by_what_it_sees(model, layers, first: Cut, second: Cut, kind: str):
    """The second prompt's cut keeps what its last token attends to most, the first prompt there."""
    above, bias = layers[second.layer - 1]
    x = model.layer(second.layer - 1, above.x, above.position, bias)
    start = len(x) - len(second.visual)
    share = attention(model, second.layer - 1, above.x, above.position, bias)[-1]
    if kind == "lookahead":  # of a layer whose cache has the first prompt as it was cut there
        now = replace(above, x=x).cut(first.with_text(0, len(second.visual)), Setting())
        bias = now.bias(model, now.size, Setting())
        share = attention(model, second.layer, now.x, now.position, bias)[-1]
        start = len(now.x) - len(second.visual)
    visual = [i for i, is_visual in enumerate(second.visual) if is_visual]
    kept = [m[0] for m in second.members if m[0] in visual]
    scores = [float(share[start + i]) for i in visual]
    assert kept == [visual[i] for i in straight_stages.highest(scores, len(kept))]


@each_family
@each_backend
@pytest.mark.parametrize("scores", ["attention", "lookahead"])
def test_a_second_turn_is_cut_by_what_it_sees_of_the_first(family, backend, scores):
    inputs = make_inputs(family)
    later = make_inputs(family, [(2, Picture(8, 8), 3)], seed=1)
    model = tiny_model(family)
    schedule = {"layers": [1.0, 0.5, 0.5, 0.25], "scores": scores}
    handle = restore_ext.attach(model, schedule=schedule, backend=backend)
    how = Setting(**setting_of(handle))
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    prompt, first = reduced_row(family, inputs, handle, 0, how), cuts_of(handle, 0)
    full = naive(family).prompt(later, image_features(stock(family), later), start=prompt.following)
    options = {n: v for n, v in later.items() if n not in ("input_ids", "attention_mask")}
    options["position_ids"] = full.position[:, None] if len(full.position) == 3 else full.position
    step(model, later["input_ids"], past, inputs["input_ids"].shape[1], **options)
    second, every = cuts_of(handle, 0), prompt.then(full)
    asks = torch.ones(len(every), dtype=torch.bool)
    layers, _ = walk(naive(family), every, asks, both_turns(first, 0, second), how)
    for one, other in zip(first, second, strict=True):
        assert_goes_by_what_it_sees(naive(family), layers, one, other, scores)


@each_backend
@pytest.mark.parametrize(
    ("family", "kind", "restore"),
    [
        ("llava", "two cuts", True),
        ("llava", "two cuts", False),  # counts positions anew
        ("llava", "chain", True),
        ("qwen2_5_vl", "clusters", True),
        ("qwen2_5_vl", "drop all", True),
    ],
)
def test_a_second_turn_with_a_new_image_is_cut_too(family, kind, restore, backend):
    inputs = make_inputs(family)
    later = make_inputs(family, [(2, Picture(8, 8), 3)], seed=1)
    model, handle = attached(family, kind, backend=backend, restore=restore)
    how = Setting(**setting_of(handle))
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    prompt, first = reduced_row(family, inputs, handle, 0, how), cuts_of(handle, 0)
    logical = inputs["input_ids"].shape[1]
    answer = torch.tensor([[31, 32, 33]])
    past = step(model, answer, past, logical).past_key_values
    told = naive(family).text(answer[0], prompt.following)
    features = image_features(stock(family), later)
    full = naive(family).prompt(later, features, start=told.following)
    options = {n: v for n, v in later.items() if n not in ("input_ids", "attention_mask")}
    options["position_ids"] = full.position[:, None] if len(full.position) == 3 else full.position
    out = step(model, later["input_ids"], past, logical + len(told), **options)
    held = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert held == [report.tokens_after for report in handle.last.layers]
    new = naive(family).reduced(full, handle.last.plan, 0, how)
    cuts = both_turns(first, len(told), cuts_of(handle, 0))
    asks = torch.tensor([True] * len(prompt) + [False] * len(told) + [True] * len(new))
    every = prompt.then(told).then(new)
    x = walk(naive(family), every, asks & how.distance, cuts, how)[1]
    assert_close(out.logits[0], said(naive(family), x)[-out.logits.shape[1] :])
    seven = naive(family).text(torch.tensor([7]), new.following)
    place = seven.position[:, None] if len(full.position) == 3 else seven.position
    logical += len(told) + len(full)
    after = step(model, torch.tensor([[7]]), out.past_key_values, logical, position_ids=place)
    asks = torch.cat([asks, torch.tensor([False])])
    cuts = [cut.with_text(0, 1) for cut in cuts]
    x = walk(naive(family), every.then(seven), asks & how.distance, cuts, how)[1]
    assert_close(after.logits[0, -1], said(naive(family), x)[-1])


@each_family
@some_kinds
def test_switched_off_in_a_conversation_the_cut_cache_still_answers(family, kind):
    inputs = make_inputs(family)
    model, handle = attached(family, kind, restore=kind != "two cuts")
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    handle.enabled = False
    out = step(model, torch.tensor([[7, 8, 9]]), past, inputs["input_ids"].shape[1])
    tokens = torch.tensor([7, 8, 9, 0])
    want = expected(family, inputs, handle, tokens, **setting_of(handle))
    assert_close(out.logits[0], want[1:])


def test_a_cut_conversation_is_not_counted_on_without_its_cuts():
    inputs = make_inputs("llava")
    model, _ = attached("llava", "two cuts", restore=False)
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    restore_ext.attach(model, keep=9, restore=False)
    with pytest.raises(RuntimeError, match="cut inside the language model"):
        step(model, torch.tensor([[7]]), past, inputs["input_ids"].shape[1])


@each_family
@each_backend
def test_the_rows_of_a_cut_cache_can_be_repeated_reordered_and_chosen(family, backend):
    inputs = make_inputs(family, RAGGED)
    model, _ = attached(family, "two cuts", backend=backend)
    if family == "llava":  # as generate() numbers a padded row
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
        again = model(**inputs, use_cache=True).past_key_values
    logical, tokens = inputs["input_ids"].shape[1], torch.tensor([[17], [40]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    ends = inputs["attention_mask"].sum(1, keepdim=True)
    ends = ends.expand(3, 2, 1) if family == "qwen2_5_vl" else ends
    want = step(model, tokens, past, logical, position_ids=ends, attention_mask=mask).logits
    again.batch_repeat_interleave(2)
    again.reorder_cache(torch.tensor([3, 0, 2, 1]))
    again.batch_select_indices(torch.tensor([0, 1]))
    options = {"position_ids": ends.flip(-2), "attention_mask": mask.flip(0)}
    got = step(model, tokens.flip(0), again, logical, **options).logits
    assert_close(got.flip(0), want)


@each_family
@pytest.mark.parametrize("kind", ["fastv merge", "clusters", "two cuts"])
def test_the_mask_backend_gives_the_features_the_gradient_of_the_naive_model(family, kind):
    inputs = make_inputs(family)
    model, handle = attached(family, kind, backend="mask")
    caught = []

    def keep(_, args, out):
        out.retain_grad()
        caught.append(out)

    projector(model, family).register_forward_hook(keep)
    model(**inputs).logits[0, -1, 7].backward()
    how = Setting(**setting_of(handle))
    features = [f.double().requires_grad_() for f in image_features(stock(family), inputs)]
    full = naive(family).prompt(inputs, features)
    prompt = naive(family).reduced(full, handle.last.plan, 0, how)
    asks = torch.full((len(prompt),), how.distance)
    x = walk(naive(family), prompt, asks, cuts_of(handle, 0), how)[1]
    said(naive(family), x)[-1, 7].backward()
    want = features[0].grad
    if family == "qwen2_5_vl":  # the merger works window by window
        want = want[window_order(inputs["image_grid_thw"])]
    assert want.abs().max() > 1e-3
    assert_close(caught[0].grad.flatten(0, -2), want, 1e-4)


@pytest.mark.parametrize("kind", ["fastv merge", "clusters"])
def test_without_kernels_tokens_are_cut_on_the_cpu(kind, monkeypatch):
    inputs = make_inputs("llava", RAGGED)
    model, handle = attached("llava", kind)
    want, plans = forward(model, inputs), [stage.plan for stage in handle.last.stages]
    moved = []
    cpu = torch.Tensor.cpu
    for module in (images, hf_step):
        monkeypatch.setattr(module, "why_no_kernels", lambda device: "a stand-in")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x) or cpu(x))
    assert torch.equal(forward(model, inputs), want)
    assert moved
    for stage, plan in zip(handle.last.stages, plans, strict=True):
        assert torch.equal(stage.plan.assign, plan.assign)


@each_family
@some_kinds
def test_gradient_checkpointing_changes_no_gradient(family, kind):
    """It runs every layer a second time on the way back, with the cuts that were made."""
    inputs, grads = make_inputs(family, RAGGED), []
    for checkpointing in (False, True):
        model, handle = attached(family, kind, backend="mask")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, use_cache=False).logits[0, -1].square().sum().backward()
        assert len(handle.last.stages) == len(handle.settings.stages)
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*grads, strict=True):
        assert torch.allclose(again, plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())


@each_family
def test_the_withdrawal_layer_is_the_first_that_changes_little_enough(family):
    model, apart = tiny_model(family), []
    prompts = [make_inputs(family, seed=seed) for seed in range(2)]
    for layer in (1, 2, 3):
        divergence = []
        for inputs in prompts:
            words = []
            for cut in (False, True):
                prompt = naive(family).prompt(inputs)
                visual = (inputs["input_ids"][0] == model.config.image_token_id).tolist()
                left = [i for i, is_visual in enumerate(visual) if not is_visual]
                cuts = [Cut(layer, [[i] for i in left], left, visual)] if cut else []
                asks = torch.zeros(len(prompt), dtype=torch.bool)
                how = Setting(size=False, distance=False, uniform_first=False)
                x = walk(naive(family), prompt, asks, cuts, how)[1]
                words.append(said(naive(family), x)[-1].softmax(-1))
            whole, withdrawn = words
            divergence.append(float((withdrawn * (withdrawn / whole).log()).sum()))
        apart.append(sum(divergence) / len(divergence))
    for threshold in [0.0, *(1.0001 * d for d in apart), *(0.9999 * d for d in apart), 1e9]:
        want = next((i + 1 for i, d in enumerate(apart) if d <= threshold), None)
        got = restore_ext.find_withdrawal_layer(model, prompts, threshold=threshold, first=1)
        assert got == want
    assert torch.equal(forward(model, prompts[0]), forward(stock(family), prompts[0]))


def test_the_withdrawal_search_says_what_is_wrong():
    model, prompt = tiny_model("llava"), make_inputs("llava")
    search = restore_ext.find_withdrawal_layer
    with pytest.raises(ValueError, match=r"first must be in 1..3, got 5"):
        search(model, [prompt], first=5)
    assert search(model, [prompt], threshold=1e9) == 1  # 5 of 32 layers, in one of 4
    with pytest.raises(ValueError, match="prompts must be at least one"):
        search(model, [], first=1)
    with pytest.raises(ValueError, match=r"prompts\[1\] must have pixel_values, .*'input_ids'\]"):
        search(model, [prompt, {"input_ids": prompt["input_ids"]}], first=1)
    with pytest.raises(ValueError, match="threshold must be a number >= 0, got -1"):
        search(model, [prompt], first=1, threshold=-1)
    restore_ext.attach(model, keep=3)
    with pytest.raises(RuntimeError, match="model must not be attached"):
        search(model, [prompt], first=1)


@each_family
@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"method": "fastv", "options": {"layer": 4}}, ValueError, "1..3 of this model"),
        (
            {"method": "fastv", "options": 3},
            TypeError,
            "options must be a dict",
        ),
        ({"method": "fastv", "schedule": {"method": "vtw"}}, ValueError, "schedule must be None"),
        ({"method": "divprune", "keep": 4, "options": {"step": 2}}, TypeError, "no option 'step'"),
        ({"schedule": {"layers": [3, 2]}}, ValueError, "model's 4 layers, got 2"),
        ({"schedule": {"layers": [3] * 4, "rate": 1}}, TypeError, "no option 'rate'"),
        ({"method": "fastest"}, ValueError, "method must be one of .*fastv.*, got 'fastest'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(family, given, error, says):
    model, inputs = tiny_model(family), make_inputs(family, TEXT_ONLY)
    with pytest.raises(error, match=says):
        restore_ext.attach(model, **given)
    assert not model.model._forward_pre_hooks
    assert torch.equal(forward(model, inputs), forward(stock(family), inputs))


@each_family
def test_labels_and_other_caches_are_refused_where_a_cut_will_be_made(family):
    inputs = make_inputs(family)
    model, _ = attached(family, "drop all")
    with pytest.raises(ValueError, match="labels cannot be used"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
        model.generate(**inputs, prefill_chunk_size=8, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="needs a DynamicCache"):
        model.generate(**inputs, cache_implementation="static", max_new_tokens=2)


def test_options_reach_the_methods_before_the_language_model():
    model, inputs = tiny_model("llava"), make_inputs("llava")
    picks = []
    for step_size in (1, 8):
        handle = restore_ext.attach(model, keep=9, options={"step": step_size})
        forward(model, inputs)
        picks.append(handle.last.plan.source.tolist())
    assert picks[0] != picks[1]
