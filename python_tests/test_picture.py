"""Pictures of a reduction: what was kept is clear, merged is tinted, dropped is dark."""

import numpy as np
import pytest
import torch
from PIL import Image

from restore_ext.picture import MARGIN, PAPER, SIDE, Heat, Panel, explain, show, warm
from restore_ext.reduce import reduce_tokens

RED = Image.new("RGB", (90, 90), (200, 30, 30))


def reduction(restore, N=36, keep=12):
    x = torch.randn(1, N, 8, generator=torch.Generator().manual_seed(0))
    return reduce_tokens(x, keep=keep, method="uniform", restore=restore)


def patches(picture, side=6):
    """The middle of every patch's upper part, where neither frame nor dot is: [N, 3]."""
    step = SIDE // side
    pixels = np.asarray(picture).astype(int)
    at = np.arange(side) * step + step // 8
    return pixels[at][:, at].reshape(-1, 3)


def test_dropped_patches_are_dark_and_kept_ones_as_they_were():
    r = reduction(restore=False)
    seen = patches(show(RED, r))
    dropped = (r.group[0] < 0).numpy()
    assert dropped.sum() == 24
    assert (seen[dropped].max(1) < 60).all()
    assert (seen[~dropped] == (200, 30, 30)).all()


def test_a_group_has_one_colour_and_neighbours_in_number_have_others():
    r = reduction(restore=True)
    seen, group = patches(show(RED, r)), r.group[0].numpy()
    colours = {}
    for m in range(12):
        (colour,) = {tuple(c) for c in seen[group == m]}
        assert (colour == (200, 30, 30)) == bool(r.kept[0, m])
        if r.merged[0, m]:
            colours[m] = colour
    assert len(set(colours.values())) == len(colours) == 6


def test_a_merged_token_has_its_dot_where_it_stands():
    r = reduction(restore=True)
    pixels = np.asarray(show(RED, r))
    for m, n in enumerate(r.position[0].tolist()):
        step = SIDE // 6
        y, x = n // 6 * step + step // 2, n % 6 * step + step // 2
        ring = pixels[y - round(step * 0.26) : y, x]  # from the dot's upper rim to its middle
        assert (ring == PAPER).all(1).any() == bool(r.merged[0, m])


def test_panels_stand_side_by_side_under_the_heading():
    blank = explain(RED, "", [Panel("", "")] * 2)
    sheet = explain(
        RED, "where is the ring ?", [Panel("all", "36"), Panel("few", "12", reduction(True))]
    )
    assert sheet.size == blank.size == (3 * MARGIN + 2 * SIDE, blank.height)
    changed = np.asarray(sheet).astype(int) != np.asarray(blank).astype(int)
    left, right = changed[:, : MARGIN + SIDE], changed[:, MARGIN + SIDE :]
    assert left[:76].any() and not left[76 : 76 + SIDE].any() and left[76 + SIDE :].any()
    assert right[76 : 76 + SIDE].any()


def test_attention_is_bright_where_it_falls_on_a_grid_of_any_shape():
    values = [i / 11 for i in range(12)]
    picture = warm(RED, Heat(values, most=1.0), (3, 4))
    assert picture.size == (SIDE, SIDE * 3 // 4)
    step = SIDE // 4
    cells = np.asarray(picture).astype(int)[step // 2 :: step, step // 2 :: step].sum(-1).ravel()
    assert len(cells) == 12 and (np.diff(cells) > 0).all()
    again = warm(RED, Heat([2 * v for v in values], most=1.0), (3, 4))
    assert (np.asarray(again)[-1, -1] == np.asarray(picture)[-1, -1]).all(), "no more than bright"
    blank = np.asarray(warm(RED, Heat([0.0] * 12, most=0.0), (3, 4)))
    assert (blank == blank[0, 0]).all()
    with pytest.raises(
        ValueError, match=r"heat must be of a grid of 3 x 5 of tokens, got \[1, 12\]"
    ):
        warm(RED, Heat(values, most=1.0), (3, 5))


def test_a_reduction_of_a_grid_that_is_no_square_is_drawn_in_its_proportions():
    r = reduction(restore=False, N=24)
    picture = show(RED, r, (4, 6))
    assert picture.size == (SIDE, SIDE * 4 // 6)
    step = SIDE // 6
    seen = np.asarray(picture).astype(int)[step // 8 :: step, step // 8 :: step].reshape(-1, 3)
    assert (((seen == (200, 30, 30)).all(1)) == (r.group[0] >= 0).numpy()).all()
    tall = explain(RED, "", [Panel("", "", r)] * 3, grid=(6, 4), columns=2)
    assert tall.width == 3 * MARGIN + 2 * SIDE and tall.height > 2 * SIDE


def test_a_reduction_that_is_no_square_grid_is_refused():
    with pytest.raises(ValueError, match=r"square grid of tokens, got \[1, 35\]"):
        show(RED, reduction(True, N=35))
