"""One budget for each image, or one for all the images of a prompt; the methods' own options."""

from fractions import Fraction

import pytest
import torch
from hf_harness import (
    answers,
    assert_close,
    assert_is_naive,
    attach,
    beam_rows,
    each_family,
    forward,
    generate,
    logits,
)
from naive_stages import expected as with_cuts
from naive_stages import setting_of

import restore_ext
from restore_ext.hf.images import reduce_images
from restore_ext.hf.settings import split_budget
from restore_ext.hf.vision import Seen
from restore_ext.testing.models import (
    RAGGED,
    TWO_IMAGES,
    VERSION,
    Picture,
    image_tokens,
    make_inputs,
    tiny_model,
)

THREE = [(4, Picture(8, 12), 2, Picture(4, 6), Picture(6, 8), 3)]


def kept(handle) -> list[int]:
    return [image.tokens_after for image in handle.last.images]


def by_hand(total: int, tokens: list[int]) -> list[int]:
    """The same in fractions: one each, then shares of what is left, then the largest remainders."""
    left = min(max(total - len(tokens), 0), sum(tokens) - len(tokens))
    whole = sum(tokens) - len(tokens)
    exact = [Fraction(left * (n - 1), whole) if whole else Fraction(0) for n in tokens]
    got = [int(e) for e in exact]
    while sum(got) < left:
        lacks = [e - g for e, g in zip(exact, got, strict=True)]
        got[lacks.index(max(lacks))] += 1
    return [1 + g for g in got]


def test_a_total_is_split_in_proportion_and_exactly():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        count = int(torch.randint(1, 7, (1,), generator=generator))
        tokens = torch.randint(1, 50, (count,), generator=generator).tolist()
        for total in (1, count, count + 1, sum(tokens) // 3 + 1, sum(tokens) - 1, sum(tokens), 999):
            shares = split_budget(total, tokens)
            assert shares == by_hand(total, tokens)
            assert sum(shares) == min(max(total, count), sum(tokens))
            assert all(1 <= share <= n for share, n in zip(shares, tokens, strict=True))
    assert split_budget(10, [5, 5, 5]) == [4, 3, 3]
    assert split_budget(100, [576, 576, 144]) == [44, 44, 12]


@each_family
def test_a_shared_budget_is_the_total_of_a_row(family):
    inputs = make_inputs(family, THREE)
    model = tiny_model(family)
    tokens = image_tokens(inputs)
    for keep in (1, 3, 11, 20):
        handle = attach(model, keep=keep, budget="shared", method="uniform")
        forward(model, inputs)
        assert kept(handle) == split_budget(keep, tokens) and sum(kept(handle)) == max(keep, 3)
    handle = restore_ext.attach(model, keep_ratio=0.25, budget="shared", method="uniform")
    forward(model, inputs)
    assert sum(kept(handle)) == round(0.25 * sum(tokens))
    handle = attach(model, keep=sum(tokens), budget="shared", method="uniform")
    forward(model, inputs)
    assert handle.last is None


@each_family
@pytest.mark.parametrize("method", ["vispruner", "token_pooling"])
def test_a_batch_of_rows_with_shared_budgets_is_the_naive_model(family, method):
    inputs = make_inputs(family, RAGGED)
    model = tiny_model(family)
    handle = attach(model, keep=13, budget="shared", method=method)
    assert_is_naive(family, inputs, handle, generate(model, inputs))
    first, second, third = image_tokens(inputs)
    assert kept(handle) == [*split_budget(13, [first, second]), min(13, third)]


@each_family
def test_beams_share_as_their_row_does(family):
    rows = RAGGED if VERSION >= (5, 18) or family != "llava" else [(5, Picture(), 7)] * 2
    inputs = make_inputs(family, rows)
    model = tiny_model(family)
    handle = attach(model, keep=13, budget="shared", method="uniform")
    generate(model, inputs)
    alone = kept(handle)
    generate(model, inputs, num_beams=2)
    assert sorted(kept(handle)) == sorted(alone * 2)


def test_images_encoded_once_share_anew_in_other_rows():
    settings = attach(tiny_model("llava"), keep=12, budget="shared", method="uniform").settings
    features = [torch.randn(64, 8) for _ in range(2)]
    seen = Seen(2)

    def left(rows: list[list[int]]) -> list[int]:
        found = reduce_images(
            features, seen, rows, settings, encoded_once=True, refuse=lambda: None
        )
        return [reduction.position.shape[1] for reduction in found]

    assert left([[0, 1]]) == [6, 6]
    assert left([[0], [1]]) == [12, 12]
    known = seen.reduced
    assert left([[0], [1]]) == [12, 12] and seen.reduced is known


INSIDE = {
    "fastv": {"method": "fastv", "keep": [5, 9, 3]},
    "lookahead": {"method": "pyramiddrop", "keep": torch.tensor([2, 7, 5])},
    "clusters": {"method": "sparsevlm", "keep": [6, 4, 9], "options": {"recycle": 0.9}},
    "merge": {"method": "fastv", "keep": [5, 9, 3], "options": {"merge": True}},
    "shared": {"method": "fastv", "keep": 13, "budget": "shared"},
    "a share": {"method": "pyramiddrop", "keep_ratio": 0.2, "budget": "shared"},
}


@each_family
@pytest.mark.parametrize("name", INSIDE)
def test_a_budget_inside_the_language_model_is_of_each_image_or_shared(family, name):
    inputs = make_inputs(family, RAGGED)
    model, asked = tiny_model(family), INSIDE[name]
    handle = restore_ext.attach(model, **asked)
    out = generate(model, inputs)
    for row, tokens in enumerate(answers(out, inputs)):
        want = with_cuts(family, inputs, handle, tokens, row, **setting_of(handle))
        assert_close(logits(out)[row], want)
    tokens, left = image_tokens(inputs), handle.last.layers[-1].visual
    if name == "clusters":  # of each image as of it alone, with what it is to keep
        own = [restore_ext.attach(model, **{**asked, "keep": n}).settings for n in asked["keep"]]
        wanted = tokens
        for cut in zip(*(settings.stages for settings in own), strict=True):
            stages = zip(cut, tokens, wanted, strict=True)
            wanted = [stage.counts(n, now)[0] for stage, n, now in stages]
        assert left == wanted and len(set(left)) == 3
    elif asked.get("budget") == "shared":
        ratio = asked.get("keep_ratio")
        rows = [tokens[:2], tokens[2:]]
        totals = [asked["keep"] if ratio is None else round(ratio * sum(row)) for row in rows]
        pairs = zip(totals, rows, strict=True)
        assert left == [n for total, row in pairs for n in split_budget(total, row)]
    else:
        assert left == list(asked["keep"])


@each_family
def test_beams_keep_inside_what_their_row_does(family):
    inputs = make_inputs(family, beam_rows(family))
    model = tiny_model(family)
    images = len(image_tokens(inputs))
    for keep, budget in (([7, 4, 5][:images], "per_image"), (11, "shared")):
        handle = restore_ext.attach(model, method="fastv", keep=keep, budget=budget)
        generate(model, inputs)
        alone = handle.last.layers[-1].visual
        generate(model, inputs, num_beams=2)
        assert sorted(handle.last.layers[-1].visual) == sorted(alone * 2)


def test_as_many_budgets_inside_as_images():
    model, inputs = tiny_model("llava"), make_inputs("llava", TWO_IMAGES)
    handle = restore_ext.attach(model, method="fastv", keep=[4, 5, 6])
    with pytest.raises(ValueError, match="one int or one per image, 2 images, got 3"):
        forward(model, inputs)
    handle.detach()
    handle = restore_ext.attach(model, method="fastv", keep=[64, 64])
    want = forward(model, inputs)
    assert handle.last is None
    handle.detach()
    assert torch.equal(forward(model, inputs), want)
    handle = restore_ext.attach(model, method="fastv", keep=[64, 5])
    forward(model, inputs)
    assert handle.last.layers[-1].visual == [64, 5]


@pytest.mark.parametrize("method", ["vispruner", "fastv"])
@pytest.mark.parametrize("keep", [[5], [5, 6], [5, 6, 7, 8]])
def test_a_budget_for_some_of_the_images_is_refused(method, keep):
    model, inputs = tiny_model("llava"), make_inputs("llava", THREE)
    with (
        restore_ext.attach(model, method=method, keep=keep),
        pytest.raises(ValueError, match=f"keep must be .* 3 images, got {len(keep)}"),
    ):
        forward(model, inputs)


@each_family
def test_an_option_of_the_method_comes_through(family):
    inputs = make_inputs(family, TWO_IMAGES)
    found = []
    for options in (None, {"algorithm": "medoids"}, {"algorithm": "means", "iterations": 1}):
        model = tiny_model(family)
        handle = attach(model, method="token_pooling", options=options)
        forward(model, inputs)
        found.append([image.reduction.group for image in handle.last.images])
    default, medoids, means = found
    assert all(torch.equal(a, b) for a, b in zip(default, medoids, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(default, means, strict=True))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budget": "joint"}, ValueError, "budget must be one of per_image, shared, got 'joint'"),
        (
            {"budget": "shared", "keep": [4, 4]},
            ValueError,
            r"one int for budget='shared', .*\[4, 4\]",
        ),
        (
            {"method": "fastvv", "keep": None, "schedule": {"method": "fastv"}},
            ValueError,
            "method must be one of random, .* got 'fastvv'",
        ),
        ({"options": [1]}, TypeError, r"options must be a dict .* got \[1\]"),
        (
            {"budget": "shared", "method": "fastv", "keep": [9, 5]},
            ValueError,
            r"one int for budget='shared', .*\[9, 5\]",
        ),
        (
            {"budget": "shared", "keep": None, "schedule": {"method": "fastv", "keep": 9}},
            ValueError,
            "budget must be 'per_image' for method fastv, .* got 'shared'",
        ),
        (
            {"budget": "shared", "keep": None, "schedule": {"method": "vtw"}},
            ValueError,
            "budget must be 'per_image' for method vtw, .* got 'shared'",
        ),
        ({"method": "pyramiddrop", "keep": [4, 0]}, ValueError, r"keep\[1\] must be an int >= 1"),
        ({"method": "vtw", "keep": [4, 5]}, ValueError, "vtw takes no keep"),
        (
            {"schedule": {"method": "fastv", "keep": [4, 5]}},
            TypeError,
            r"keep must be one int for method fastv, .* got \[4, 5\]",
        ),
        ({"method": "vtw", "keep": 4}, ValueError, "method vtw takes no keep or keep_ratio"),
        (
            {"keep": None, "schedule": {"method": "fastv"}, "options": {"layer": 3}},
            ValueError,
            r"options must be None for a schedule without keep .* got \{'layer': 3\}",
        ),
        ({"options": {"step": 0}}, ValueError, "step must be an int >= 1, got 0"),
        ({"options": {"share": 1}}, TypeError, "vispruner has no option 'share'"),
    ],
)
def test_says_what_is_wrong_and_attaches_nothing(given, error, message):
    model = tiny_model("llava")
    with pytest.raises(error, match=message):
        attach(model, **given)
    assert not hasattr(model, "_restore_ext_handle")
