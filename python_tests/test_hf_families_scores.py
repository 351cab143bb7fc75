"""What a method is handed of the tokens is what the family's own tower made of them."""

import math
import sys

import pytest
import torch
from family_cases import RATIO, TILED, one_by_one, pictures_of
from family_checks import scaled_shape
from hf_harness import assert_close, forward

import restore_ext
from restore_ext.methods import METHODS, Method
from restore_ext.methods.problem import CLS, KEYS
from restore_ext.testing.models import join_rows, tiny_model
from restore_ext.testing.zoo.llava_next import TILE, grid_of, packed_shape

# The scored attention of each family: its module, whether the CLS token's row is asked for, and
# how many patches to a side of a token.
SCORED = {
    "llava": ("encoder.layers.1.self_attn", True, 1),
    "llava_next": ("encoder.layers.1.self_attn", True, 1),
    "llava_onevision": ("encoder.layers.2.self_attn", False, 1),
    "llava_onevision_several": ("encoder.layers.2.self_attn", False, 1),
    "internvl": ("encoder.layer.2.attention", True, 2),
    "mistral3": ("transformer.layers.2.attention", False, 2),
    "pixtral": ("transformer.layers.2.attention", False, 1),
    "idefics3": ("encoder.layers.2.self_attn", False, 2),
    "smolvlm": ("encoder.layers.2.self_attn", False, 2),
    "aya_vision": ("encoder.layers.2.self_attn", False, 2),
    "paligemma": ("encoder.layers.2.self_attn", False, 1),
    "gemma3": ("encoder.layers.2.self_attn", False, 2),
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", SCORED)
def test_scores_and_keys_are_those_of_the_familys_tower(monkeypatch, family, attn):
    pictures = pictures_of(family)
    inputs, model = join_rows(one_by_one(family)), tiny_model(family, attn=attn)
    scores, keys = [], []

    def first_tokens(problem, budget):
        scores.extend(problem.scores)
        keys.extend(problem.metric)
        return torch.arange(budget).expand(len(problem.scores), budget)

    monkeypatch.setitem(METHODS, "spy", Method(first_tokens, scores=CLS, metric=KEYS))
    with restore_ext.attach(model, method="spy", keep_ratio=RATIO):
        forward(model, inputs)
    weights, tower_keys = tower_attention(monkeypatch, family, inputs)
    for got, want in zip(scores, expected_scores(family, weights, pictures), strict=True):
        assert got.shape == want.shape
        assert got.allclose(want, rtol=1e-4, atol=1e-7)
        assert want.std() > 0.05 * want.mean()
    patches = tower_keys.mean(1)[:, int(SCORED[family][1]) :]  # the CLS token is no feature
    for number, channel in enumerate(patches.unbind(-1)):
        want = of_tokens(family, channel, pictures)
        assert_close(torch.cat([image[:, number] for image in keys]), torch.cat(want))


def tower_attention(monkeypatch, family: str, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights [B, H, N, N] of the scored module, and its keys [B, H, N, D]."""
    model = tiny_model(family, attn="eager")
    place = SCORED[family][0]
    [module] = [m for n, m in model.named_modules() if n.endswith(place) and "language" not in n]
    modeling, caught = sys.modules[type(module).__module__], []
    original = modeling.eager_attention_forward

    def catching(asked, query, key, value, mask, **kwargs):
        if asked is module:
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            weights = query @ key.mT * scale + (0 if mask is None else mask)
            caught.append((weights.softmax(-1), key))
        return original(asked, query, key, value, mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling, "eager_attention_forward", catching)
        forward(model, inputs)
    [seen] = caught
    return seen


def expected_scores(family: str, weights: torch.Tensor, pictures: list) -> list[torch.Tensor]:
    if SCORED[family][1]:
        return of_tokens(family, weights.mean(1)[:, 0, 1:], pictures)
    if family not in ("mistral3", "pixtral"):
        return of_tokens(family, weights.mean(1).mean(1), pictures)
    # All images are in one sequence: a token is seen by those of its image alone.
    sizes = [picture.height * picture.width for picture in pictures]
    seen_by = torch.tensor(sizes).repeat_interleave(torch.tensor(sizes))
    return of_tokens(family, weights.mean(1).sum(1) / seen_by, pictures)


def of_tokens(family: str, rows: torch.Tensor, pictures: list) -> list[torch.Tensor]:
    """[N] of each image, from a number for each of the tower's tokens [B, P]."""
    side = SCORED[family][2]
    if family in ("mistral3", "pixtral"):
        images = rows[0].split([picture.height * picture.width for picture in pictures])
        pairs = zip(images, pictures, strict=True)
        return [blocks(image.view(p.height, p.width), side) for image, p in pairs]
    if family in TILED:
        return packed_scores(family, rows, pictures)
    edge = math.isqrt(rows.shape[1])
    return [blocks(row.view(edge, edge), side) for row in rows]


def blocks(grid: torch.Tensor, side: int) -> torch.Tensor:
    """The mean over side x side neighbours, raster order."""
    means = [
        grid[y : y + side, x : x + side].mean()
        for y in range(0, grid.shape[0], side)
        for x in range(0, grid.shape[1], side)
    ]
    return torch.stack(means)


def packed_scores(family: str, tiles: torch.Tensor, pictures: list) -> list[torch.Tensor]:
    """The overview's, and those of the tiles side by side without what is padding."""
    scores, first = [], 0
    for picture in pictures:
        down, across = grid_of(picture)
        overview = tiles[first]
        pieces = tiles[first + 1 : first + 1 + down * across].view(down, across, TILE, TILE)
        whole = torch.cat([torch.cat(list(row), 1) for row in pieces])
        height, width = packed_shape(picture)
        top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
        seen = whole[top : top + height, left : left + width]
        if scaled_shape(family, picture) != (height, width):
            size = scaled_shape(family, picture)
            seen = torch.nn.functional.interpolate(seen[None, None], size, mode="bilinear")[0, 0]
        scores.append(torch.cat([overview, seen.flatten()]))
        first += 1 + down * across
    return scores
