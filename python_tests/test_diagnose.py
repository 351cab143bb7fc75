"""diagnose(): shares, states and words against the model's own layers in float64, one by one."""

import json

import pytest
import torch
from family_checks import ROWS, dense, model, row_inputs
from hf_harness import fingerprint, forward, fresh
from straight_diagnosis import full_run, reduced_run, visual_of

import restore_ext
from restore_ext.hf import scores
from restore_ext.hf.diagnosis import join
from restore_ext.hf.diagnosis.probe import Probe
from restore_ext.testing.models import (
    ONE_IMAGE,
    RAGGED,
    TEXT_ONLY,
    TINY,
    VERSION,
    Picture,
    join_rows,
    make_inputs,
)

WAYS = {
    "reindexed": {"restore": False, "positions": "reindex", "calibrate": "none"},
    "original": {"restore": False, "positions": "original", "calibrate": "none"},
    "restore": {},
}
UNIFORM = {"method": "uniform", "keep_ratio": 0.3, "layer0": "uniform"}
INSIDE = {
    "two cuts": {"schedule": {"layers": [1.0, 1.0, 0.5, 0.2], "scores": "lookahead"}},
    "merges": {
        "method": "divprune",
        "keep_ratio": 0.5,
        "schedule": {"method": "fastv", "keep": 3, "layer": 3, "merge": True},
    },
}
CASES = [(family, "on the way in") for family in sorted({*TINY} - {"llava_onevision_several"})]
CASES += [
    ("llava", "image first"),
    ("llava", "two cuts"),
    ("qwen2_5_vl", "merges"),
    ("gemma3", "merges"),
]
# The first row is the longer one, and is padded once it is reduced: its first token is visual.
IMAGE_FIRST = [(Picture(), Picture(), 3), (50, Picture(), 10)]
WORDS = 2
# 4.57 gets the second word of a padded row wrong by itself, in layers with a sliding window.
ONE_WORD = ("paligemma2",) if VERSION < (5, 0) else ()
TOLERANCE = 2e-4  # of shares in 0..1, float32 beside float64


def close(got, want, tolerance=TOLERANCE):
    want = torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert ((got.double() - want).abs().nan_to_num() < tolerance).all()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_ragged_batch_is_what_float64_finds_row_by_row(monkeypatch, family, kind):
    monkeypatch.setattr(scores, "_ROWS", 7)  # without the operator, so many rows at a time
    rows = IMAGE_FIRST if kind == "image first" else [ROWS[0], ROWS[2]]
    options = INSIDE.get(kind, UNIFORM)
    options = {**options, "backend": "mask" if kind == "two cuts" else "op"}
    alone = row_inputs(family, rows)
    inputs = join_rows(alone)
    words = 1 if family in ONE_WORD else WORDS
    found = restore_ext.diagnose(model(family), inputs, new_tokens=words, **options)
    reindexes = "reindexed" in found.ways
    assert reindexes == (found.left_out == {}) and {*WAYS} - {*found.ways} <= {"reindexed"}
    handles = {}
    for name in found.ways:
        with restore_ext.attach(model(family), **options, **WAYS[name]) as handles[name]:
            forward(model(family), inputs)
    for row, single in enumerate(alone):
        S, answer = single["input_ids"].shape[1], found.answer[row].tolist()
        prompt = dense(family).prompt(single)
        visual = visual_of(handles["restore"].last.plan, row, S)
        full = full_run(dense(family), prompt, single, visual, answer)
        images = [(i, x.index) for i, x in enumerate(found.images) if x.row == row]
        padding = inputs["input_ids"].shape[1] - S
        listed = torch.cat([index for _, index in images]) - padding
        assert listed.tolist() == [s for s, is_visual in enumerate(visual) if is_visual]
        compare(found.full, full, row, images, padding)
        assert full.logits.argmax(-1).tolist() == answer
        for name, way in found.ways.items():
            if name == "reindexed" and kind in INSIDE:
                continue  # the reference does not count anew at a cut
            reduced = reduced_run(dense(family), prompt, single, handles[name], row, answer)
            compare(way, reduced, row, images, padding)
            compare_outcome(way, reduced, full, row)
            for number, index in images:
                compare_groups(way.reductions[number], reduced, (index - padding).tolist())
    if reindexes:
        assert found.distance("reindexed")["overall"].min() > 0.01


def compare(run, straight, row, images, padding):
    for kind, shares in straight.share.items():
        close(run.share[kind][row], shares)
    for kind, per_image in run.attention.items():
        for number, index in images:
            want = [layer[index - padding] for layer in straight.received[kind]]
            close(per_image[number], torch.stack(want))


def compare_groups(reduction, reduced, tokens):
    """Who is with whom in the last layer, of the tokens of one image."""
    want = [[tokens.index(s) for s in m] for m in reduced.members if set(m) <= set(tokens)]
    group = reduction.group[0]
    got = [(group == m).nonzero()[:, 0].tolist() for m in range(reduction.size.shape[1])]
    assert sorted(map(sorted, want)) == sorted(got)
    assert reduction.size[0].tolist() == [len(members) for members in got]
    assert reduction.valid.all() and (reduction.kept ^ reduction.merged).all()
    assert all(len(got[m]) == 1 for m in reduction.kept[0].nonzero()[:, 0])


def compare_outcome(way, reduced, full, row):
    """Cosines, divergence and agreement, and what became of the tokens."""
    cosines = {"visual": [], "kept": [], "merged": [], "last": []}
    for state, members, visual in zip(reduced.states, reduced.members, reduced.visual, strict=True):
        own = torch.stack([full.states[s] for s in members]).mean(0)
        cosine = torch.cosine_similarity(state, own, dim=0)
        if visual:
            cosines["visual"].append(cosine)
            cosines["kept" if len(members) == 1 else "merged"].append(cosine)
    cosines["last"] = [torch.cosine_similarity(reduced.states[-1], full.states[-1], dim=0)]
    for kind, values in cosines.items():
        want = torch.stack(values).mean() if values else torch.tensor(torch.nan)
        close(way.cosine[kind][row], want, 1e-3)
    want, got = full.logits.log_softmax(-1), reduced.logits.log_softmax(-1)
    divergence = (want.exp() * (want - got)).sum(-1)
    close(way.divergence[row] / (1 + divergence), divergence / (1 + divergence), 1e-3)
    same = full.logits.argmax(-1) == reduced.logits.argmax(-1)
    assert way.agreement[row].tolist() == same.double().tolist()
    assert way.tokens[row, -1] == sum(reduced.visual)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("backend", ["op", "mask"])
def test_where_nothing_is_reduced_nothing_differs(family, backend):
    inputs = make_inputs(family, RAGGED)
    found = restore_ext.diagnose(model(family), inputs, keep_ratio=1.0, backend=backend)
    assert set(found.ways) == set(WAYS) - set(found.left_out)
    for name, way in found.ways.items():
        assert not any(x.any() for x in found.distance(name).values())
        assert not way.divergence.any() and (way.agreement == 1).all()
        for kind in ("visual", "kept", "last"):
            assert way.cosine[kind].allclose(torch.ones(2).double())
        assert way.cosine["merged"].isnan().all()
        assert all(reduction.kept.all() for reduction in way.reductions)


def test_distances_react_to_positions_and_to_calibration():
    inputs = make_inputs("llava", RAGGED)

    def overall(**options):
        options = {"method": "uniform", "keep": 9, "new_tokens": 1, **options}
        found = restore_ext.diagnose(model("llava"), inputs, **options)
        return {name: found.distance(name)["overall"] for name in found.ways}

    found = overall()
    values = [*found.values()]
    values += [overall(calibrate=c)["restore"] for c in ("none", "size")]
    values.append(overall(layer0="uniform")["restore"])
    values.append(overall(keep=10)["restore"])
    assert len({tuple(x.tolist()) for x in values}) == 7


def test_the_one_number_is_the_mean_over_layers_of_visual_and_text_queries():
    found = restore_ext.diagnose(
        model("llava"), make_inputs("llava", RAGGED), method="vtw", options={"layer": 2}
    )
    assert found.left_out == {"restore": "RESTORE has nothing to add to this method"}
    way, full = found.ways["original"], found.full
    for row in range(2):
        # From layer 2 on there is no visual query, and text sees no visual token.
        assert way.tokens[row].tolist() == [64 * [2, 1][row]] * 2 + [0] * 2
        visual = (way.share["visual"] - full.share["visual"])[row, :2].abs().mean()
        text = (way.share["text"] - full.share["text"])[row].abs().mean()
        assert way.share["visual"][row, 2:].isnan().all() and not way.share["text"][row, 2:].any()
        assert found.distance("original")["overall"][row] == (visual + text) / 2
    assert way.cosine["visual"].isnan().all() and not way.cosine["last"].isnan().any()


def test_numbers_go_through_json_and_batches_join():
    parts = [
        restore_ext.diagnose(model("llava"), make_inputs("llava", rows), method="vtw", new_tokens=n)
        for rows, n in ((RAGGED, 1), (ONE_IMAGE, 3))
    ]
    both = join(parts)
    summary = both.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["prompts"] == 3 and summary["layers"] == 4
    assert summary["options"] == {"method": "vtw"}
    assert [image.row for image in both.images] == [0, 0, 1, 2]
    way = both.ways["original"]
    assert way.divergence.shape == both.answer.shape == (3, 3)
    assert way.divergence[:2, 1:].isnan().all() and not way.divergence[2].isnan().any()
    ends = [both.distance("original")["overall"][rows] for rows in (slice(0, 2), slice(2, 3))]
    for end, part in zip(ends, parts, strict=True):
        assert end.equal(part.distance("original")["overall"])
    said = summary["ways"]["original"]
    assert said["distance"]["overall"]["mean"] == float(torch.cat(ends).mean())
    half_width = 1.96 * float(torch.cat(ends).std()) / 3**0.5
    assert said["distance"]["overall"]["half_width"] == pytest.approx(half_width)
    assert said["share"]["visual"][-1] is None and said["share"]["text"][-1] == 0
    alone = parts[1].summary()["ways"]["original"]["kl"]
    assert alone["first"] == {"mean": float(way.divergence[2, 0]), "half_width": None}
    assert alone["answer"]["mean"] == pytest.approx(float(way.divergence[2].mean()))


def test_an_answer_counts_up_to_its_end(monkeypatch):
    inputs = make_inputs("llava", RAGGED)
    words = restore_ext.diagnose(model("llava"), inputs, keep=9, new_tokens=4).answer
    end = int(words[0, 1])
    assert end not in words[1].tolist() and end != int(words[0, 0])
    monkeypatch.setattr(model("llava").generation_config, "eos_token_id", [end])
    found = restore_ext.diagnose(model("llava"), inputs, keep=9, new_tokens=4)
    for way in found.ways.values():
        for x in (way.divergence, way.agreement):
            assert x.isnan().tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize("fails", [None, "full", "reduced", "answer"])
def test_the_model_is_left_as_it_was(monkeypatch, fails):
    ours = fresh("llava")
    inputs = make_inputs("llava", RAGGED)
    before, said = fingerprint(ours), forward(ours, inputs)
    given = {name: value.clone() for name, value in inputs.items()}
    seen, see = [], Probe.see

    def failing(probe, module, *rest):
        seen.append(module.layer_idx)
        if {"full": 2, "reduced": 6, "answer": 15}.get(fails) == len(seen):
            raise OSError("out of luck")
        see(probe, module, *rest)

    monkeypatch.setattr(Probe, "see", failing)
    if fails is None:
        restore_ext.diagnose(ours, inputs, method="fastv", keep=9, options={"layer": 2})
    else:
        with pytest.raises(OSError, match="out of luck"):
            restore_ext.diagnose(ours, inputs, keep=9)
    assert len(seen) == {"full": 2, "reduced": 6, "answer": 15}.get(fails, len(seen))
    assert fingerprint(ours) == before and torch.equal(forward(ours, inputs), said)
    assert all(given[name].equal(value) for name, value in inputs.items())
    with restore_ext.attach(ours, keep=9):
        pass


def wrong():
    right, text = make_inputs("llava", RAGGED), make_inputs("llava", TEXT_ONLY)
    one_without = join_rows([make_inputs("llava", ONE_IMAGE), text])
    padded = {**right, "attention_mask": right["attention_mask"].flip(1)}
    return {
        "no mapping": (TypeError, [], {}, "inputs must be what a processor returns, got list"),
        "no image": (ValueError, text, {}, "inputs must have pixel_values, got"),
        "a row": (ValueError, one_without, {}, "an image in every row, got none in row 1"),
        "padding": (ValueError, padded, {}, "attention_mask must be padded on the left"),
        "words": (ValueError, right, {"new_tokens": 0}, "new_tokens must be an int >= 1, got 0"),
        "method": (ValueError, right, {"method": "best"}, "method must be one of .*, got 'best'"),
        "keep": (ValueError, right, {"keep": 0}, "keep must be"),
        "option": (TypeError, right, {"keeep": 3}, "keeep"),
        "restore": (TypeError, right, {"restore": True}, "restore must not be given"),
        "positions": (TypeError, right, {"positions": "original"}, "positions must not be"),
        "enabled": (TypeError, right, {"enabled": False}, "enabled must not be given"),
    }


@pytest.mark.parametrize("mistake", wrong())
def test_mistakes_are_named_before_any_work(monkeypatch, mistake):
    kind, inputs, options, said = wrong()[mistake]
    monkeypatch.setattr(type(model("llava")), "generate", None)
    options = options if "keep" in options else {"keep": 9, **options}
    with pytest.raises(kind, match=said):
        restore_ext.diagnose(model("llava"), inputs, **options)


def test_an_attached_model_and_a_foreign_attention_are_refused(monkeypatch):
    inputs = make_inputs("llava", ONE_IMAGE)
    with (
        restore_ext.attach(model("llava"), keep=9),
        pytest.raises(RuntimeError, match="model must not be attached: detach it first"),
    ):
        restore_ext.diagnose(model("llava"), inputs, keep=9)
    config = model("llava").model.language_model.config
    monkeypatch.setattr(config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match=r"sdpa or eager to be measured, got 'flash_attention_2'"):
        restore_ext.diagnose(model("llava"), inputs, keep=9)


def test_ways_that_cannot_be_had_are_left_out_with_the_reason():
    found = {}
    for family, method in (("qwen2_5_vl", "divprune"), ("gemma3", "pyramiddrop")):
        inputs = make_inputs(family, ONE_IMAGE)
        keep = {"keep_ratio": 0.5}
        found[family] = restore_ext.diagnose(
            model(family), inputs, method=method, new_tokens=1, **keep
        )
    assert set(found["qwen2_5_vl"].ways) == {"original", "restore"}
    assert "M-RoPE keeps the positions" in found["qwen2_5_vl"].left_out["reindexed"]
    assert set(found["gemma3"].ways) == {"original", "reindexed", "restore"}
