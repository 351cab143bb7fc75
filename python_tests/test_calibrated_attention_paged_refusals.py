"""calibrated_attention_paged: what it refuses, by name."""

import re

import pytest

from restore_ext import ops, testing
from restore_ext.testing.attention import SPOILED_BIAS
from restore_ext.testing.paged import SMALL

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
SPOILED = SPOILED_BIAS | {
    "query must have 4 dimensions, got shape [4, 3, 32]": lambda g: {"query": g["query"][0]},
    "key_cache must have 4 dimensions, got shape [16, 2, 32]": lambda g: {
        "key_cache": g["key_cache"][0]
    },
    "query must have a head size D of 32 to 256 in steps of 8, got 31": lambda g: {
        "query": g["query"][..., 1:]
    },
    "query must have a head size D of 32 to 256 in steps of 8, got 288": lambda g: {
        "query": g["query"].repeat(1, 1, 1, 9)
    },
    "key_cache must have pages of 16 to 256 tokens, got 15": lambda g: {
        "key_cache": g["key_cache"][:, 1:]
    },
    "key_cache must have pages of 16 to 256 tokens, got 272": lambda g: {
        "key_cache": g["key_cache"].repeat(1, 17, 1, 1)
    },
    "key_cache must have shape [pages, page, Hkv, D] = [7, 16, 2, 32], got [7, 16, 2, 31]": (
        lambda g: {"key_cache": g["key_cache"][..., 1:]}
    ),
    "value_cache must have shape [pages, page, Hkv, D] = [7, 16, 2, 32], got [6, 16, 2, 32]": (
        lambda g: {"value_cache": g["value_cache"][1:]}
    ),
    "key_cache must have a number of heads Hkv that divides query's Hq = 3, got 2": lambda g: {
        "query": g["query"][:, 1:]
    },
    "block_table must have 2 dimensions, got shape [3]": lambda g: {
        "block_table": g["block_table"][0]
    },
    "block_table must have shape [B, max_pages] = [2, 3], got [1, 3]": lambda g: {
        "block_table": g["block_table"][:1]
    },
    "block_table must list at most 1073741824 tokens a row, got 2147483648": lambda g: {
        "block_table": g["block_table"][:, :1].expand(2, 2**27)
    },
    "seqlens must have shape [B] = [2], got [2, 1]": lambda g: {"seqlens": g["seqlens"][:, None]},
    "log_size must have shape [pages, page] = [7, 16], got [7, 15]": lambda g: {
        "log_size": g["log_size"][:, 1:]
    },
    "query must be Float, Half or BFloat16, got Double": lambda g: {"query": g["query"].double()},
    "key_cache must have the dtype of query, Float, got Half": lambda g: {
        "key_cache": g["key_cache"].half()
    },
    "value_cache must have the dtype of query, Float, got BFloat16": lambda g: {
        "value_cache": g["value_cache"].bfloat16()
    },
    "block_table must be Int, got Long": lambda g: {"block_table": g["block_table"].long()},
    "seqlens must be Int, got Long": lambda g: {"seqlens": g["seqlens"].long()},
    "log_size must be Float, got Half": lambda g: {"log_size": g["log_size"].half()},
    "query_position and key_position must both be given or neither, got only key_position": (
        lambda g: {"query_position": None}
    ),
    "query_position and key_position must both be given or neither, got only query_position": (
        lambda g: {"key_position": None}
    ),
    "query_position must have shape [B, Lq] = [2, 3], got [2, 2]": lambda g: {
        "query_position": g["query_position"][:, 1:]
    },
    "query_position must have shape [B, G, Lq] = [2, 1, 3], got [2, 3, 3]": lambda g: {
        "query_position": g["query_position"][:, None].expand(-1, 3, -1)
    },
    "key_position must have shape [pages, page] = [7, 16], got [6, 16]": lambda g: {
        "key_position": g["key_position"][1:]
    },
    "key_position must have shape [G, pages, page] = [1, 7, 16], got [2, 7, 16]": lambda g: {
        "key_position": g["key_position"].expand(2, -1, -1)
    },
}


@pytest.mark.parametrize("message", SPOILED)
def test_says_what_is_wrong(message, device):
    given = SMALL.arguments(device)
    given |= SPOILED[message](given)
    start = re.escape("calibrated_attention_paged: " + message)
    with pytest.raises(RuntimeError, match=f"^{start}$"):
        ops.calibrated_attention_paged(**given)


def test_refuses_a_gradient(device):
    given = SMALL.arguments(device)
    given["value_cache"].requires_grad_()
    said = r"calibrated_attention_paged has no gradient.*backend=.mask"
    with pytest.raises(RuntimeError, match=said):
        ops.calibrated_attention_paged(**given).sum().backward()
