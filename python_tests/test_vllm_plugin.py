"""The vLLM plug-in where there is no vLLM: positions and sizes of a prompt, and options.

What is right for positions is what attach() does. The rest is tested by make test-vllm.
"""

import sys
import types

import pytest
import torch

from restore_ext import reduce_tokens
from restore_ext.integrations.vllm import register
from restore_ext.integrations.vllm.options import DEFAULTS, cache_key, read_options, tokens_left
from restore_ext.integrations.vllm.rows import (
    BASE,
    COLUMNS,
    DELTA,
    ROWS,
    SIZE,
    Item,
    fill_rows,
    log_sizes,
    prompt_rows,
    with_columns,
)

IMAGE = -1


def prompt(*parts):
    """Ids, original positions [3, L] and sizes of text (a number) and images (N, kept, places)."""
    ids, positions, sizes, items, next_ = [], [], [], [], 0
    for part in parts:
        if isinstance(part, int):
            ids += range(1, part + 1)
            positions += [[p] * 3 for p in range(next_, next_ + part)]
            sizes += [1] * part
            next_ += part
        else:
            span, places, size = part
            items.append(Item(len(ids), len(places), span))
            ids += [IMAGE] * len(places)
            positions += [[next_ + x for x in place] for place in places]
            sizes += size
            next_ += span
    return torch.tensor(ids), torch.tensor(positions).T, torch.tensor(sizes), items, next_


SMALL = (9, [[0, 0, 2], [0, 1, 0], [0, 2, 2]], [4, 1, 300])
LARGE = (700, [[p] * 3 for p in (0, 255, 256, 511, 512, 699)], [1, 256, 257, 512, 65536, 1])
PROMPTS = {
    "one image": (5, SMALL, 4),
    "none": (7,),
    "image in front and behind": (SMALL, 3, LARGE),
    "images side by side": (2, LARGE, SMALL, LARGE, 1),
    "nothing else": (SMALL,),
}


def columns_of(parts, dtype=torch.float32):
    images = []
    for _, places, size in (part for part in parts if not isinstance(part, int)):
        tokens = torch.randn(len(places), 5).to(dtype)
        with_more = with_columns(tokens, torch.tensor(places), torch.tensor(size).float())
        assert with_more.dtype == dtype and torch.equal(with_more[:, :5], tokens)
        images.append(with_more[:, -COLUMNS:])
    return torch.cat(images) if images else torch.zeros(0, COLUMNS, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_has_its_original_positions(parts, dtype):
    ids, positions, sizes, items, past = prompt(*parts)
    rows, delta = prompt_rows(len(ids), items)
    assert rows.shape == (ROWS, len(ids)) and delta == past - len(ids)
    text = ids != IMAGE
    assert torch.equal(rows[:3, text], positions[:, text])
    filled = fill_rows(rows, ids == IMAGE, columns_of(parts, dtype), 0)
    assert torch.equal(filled[:3], positions)
    torch.testing.assert_close(log_sizes(filled), sizes.float().log())
    assert (filled[DELTA] == delta).all()
    # A generated token gets the next position in every row.
    made = torch.full((ROWS, 2), len(ids) + delta)
    assert log_sizes(made).tolist() == [0, 0]


@pytest.mark.parametrize("cuts", [[4], [7, 8, 9], [3, 6, 11]])
def test_in_chunks_and_again(cuts):
    """However a prompt is cut, and if parts are computed twice."""
    parts = PROMPTS["images side by side"]
    ids, positions, sizes, items, _ = prompt(*parts)
    rows, _ = prompt_rows(len(ids), items)
    columns, is_image = columns_of(parts), ids == IMAGE
    for _ in range(2):
        for first, past in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            skipped = int(is_image[:first].sum())
            here = columns[skipped : skipped + int(is_image[first:past].sum())]
            rows = fill_rows(rows, is_image, here, first)
    assert torch.equal(rows[:3], positions)
    assert torch.equal(rows[SIZE] - rows[0] + 1, sizes)
    assert (rows[BASE] <= rows[0]).all()


def test_columns_of_a_reduction():
    features = torch.randn(1, 50, 8)
    reduction = reduce_tokens(features, method="divprune", keep=7)
    place = torch.arange(50)[:, None].expand(-1, 3)[reduction.position[0]]
    tokens = with_columns(reduction.tokens[0], place, reduction.size[0])
    rows, delta = prompt_rows(12, [Item(3, 7, 50)])
    is_image = torch.arange(12) // 3 % 3 == 1
    is_image[6:10] = True
    rows = fill_rows(rows, is_image, tokens[:, -COLUMNS:], 0)
    assert torch.equal(rows[0, 3:10], 3 + reduction.position[0])
    assert rows[0, 10:].tolist() == [53, 54] and delta == 43
    torch.testing.assert_close(log_sizes(rows)[3:10], reduction.size[0].log())


class TestOptions:
    def test_defaults_are_those_of_attach_without_distance(self):
        settings = read_options({"keep": 8}, axes=1)
        assert (settings.calibrate, settings.positions) == ("size", "original")
        plain = read_options({"keep": 8, "restore": False}, axes=1)
        assert (plain.calibrate, plain.positions) == ("none", "reindex")
        assert read_options({"keep": 8, "restore": False}, axes=3).positions == "original"

    def test_tokens_left(self):
        assert tokens_left(read_options({"keep": 64}, 1), 576) == 64
        assert tokens_left(read_options({"keep": 64}, 1), 16) == 16
        assert tokens_left(read_options({"keep_ratio": 0.25}, 3), 90) == 22

    def test_every_option_is_in_the_key(self):
        base = {"method": "vispruner", "keep": 8}
        others = {
            "method": "fastervlm",
            "options": {"step": 4},
            "keep": 9,
            "restore": False,
            "positions": "reindex",
            "calibrate": "none",
            "retain": 0.25,
            "anchor_mode": "official",
            "seed": 1,
        }
        assert others.keys() | {"keep_ratio"} == DEFAULTS.keys()
        keys = [cache_key(read_options({**base, name: x}, 1)) for name, x in others.items()]
        keys.append(cache_key(read_options({"method": "vispruner", "keep_ratio": 0.5}, 1)))
        keys.append(cache_key(read_options(base, 1)))
        assert len(set(keys)) == len(keys)
        assert cache_key(read_options({**base, "retain": 0.5}, 1)) == keys[-1]

    @pytest.mark.parametrize(
        ("given", "error", "said"),
        [
            (None, TypeError, "must be a dict of options, got None"),
            ({"keep": 4, "min_visual_tokens": 9}, TypeError, "got min_visual_tokens"),
            ({}, ValueError, "keep"),
            ({"keep": [4]}, ValueError, "one int"),
            ({"keep": 0}, ValueError, "keep"),
            ({"keep": 4, "method": "no"}, ValueError, "method must be one of"),
            ({"keep": 4, "method": "downsample"}, NotImplementedError, "behind the projector"),
            ({"keep": 4, "method": "fastv"}, NotImplementedError, "attach"),
            ({"keep": 4, "calibrate": "size+distance"}, NotImplementedError, "distance term"),
        ],
    )
    def test_refuses(self, given, error, said):
        with pytest.raises(error, match=said):
            read_options(given, axes=1)


def test_another_vllm_is_left_alone(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    register()
    assert "leaves this one alone" in caplog.text
