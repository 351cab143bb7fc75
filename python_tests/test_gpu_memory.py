"""Memory on a GPU: attention takes no matrix of all pairs, nor do scores, matching and merging.

Without a GPU the calls are made all the same, small, and nothing is measured.
"""

import pytest
import torch

from bench import clock
from restore_ext import ops, testing
from restore_ext.testing.attention import AttentionCase
from restore_ext.testing.row_scores import RowScoresCase
from restore_ext.testing.tokens import MergeCase, TokenCase

pytestmark = pytest.mark.parametrize("device", testing.DEVICES)
SLACK = 1 << 20  # what an allocator rounds up, and workspaces of a fixed size


def output_bytes(result):
    return sum(t.numel() * t.element_size() for t in clock.tensors(result))


def beyond_output(fn, device):
    """What a second call takes beyond what it returns; the first sets up what stays."""
    size = output_bytes(fn())
    return max(clock.extra_bytes(fn, device) - size, 0)


def lengths(device):
    return (2048, 8192) if device == "cuda" else (32, 64)


def assert_linear(extra, device):
    """Four times the tokens, no more than some six times the memory."""
    short, long = (extra(L) for L in lengths(device))
    assert long <= 6 * short + SLACK, f"{short:,} bytes, then {long:,} for 4 times the length"


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_prompt_takes_memory_that_grows_as_it_does(dtype, merged, device):
    def extra(L):
        positions = "merged" if merged else None
        case = AttentionCase(Hq=4, Hkv=2, Lq=L, Lk=L, sizes=merged, positions=positions)
        given = case.arguments(device, dtype)
        return beyond_output(lambda: ops.calibrated_attention(**given), device)

    assert_linear(extra, device)


def test_a_step_takes_next_to_nothing(device):
    L = lengths(device)[1]
    given = AttentionCase(Hq=32, Hkv=32, Lq=1, Lk=L, P=0).arguments(device, torch.bfloat16)
    cache = given["key"].numel() * given["key"].element_size()
    extra = beyond_output(lambda: ops.calibrated_attention(**given), device)
    assert extra <= cache // 4 + SLACK, f"{extra:,} bytes beside keys of {cache:,}"


def test_scores_of_all_rows_take_no_matrix(device):
    def extra(L):
        case = RowScoresCase(Hq=4, Hkv=2, Lq=L, Lk=L, D=64, ranges="causal")
        given = case.arguments(device, torch.bfloat16)
        return beyond_output(lambda: ops.row_scores(**given), device)

    assert_linear(extra, device)


def test_tokens_are_compared_without_a_matrix(device):
    def of(call):
        def extra(N):
            case = TokenCase(N=N, k=N // 9, C=64)
            x, anchors = case.x(device, torch.bfloat16), case.anchors(device)
            return beyond_output(lambda: call(x, anchors), device)

        return extra

    assert_linear(of(lambda x, anchors: ops.match_bipartite(x, len(anchors[0]))), device)
    assert_linear(of(ops.assign_anchors), device)
    assert_linear(of(lambda x, _: ops.score_anchors(x)), device)


def test_merging_takes_memory_that_grows_as_the_tokens_do(device):
    def extra(N):
        given = MergeCase(N=N, M=N // 9, C=64).arguments(device, torch.bfloat16)
        return beyond_output(lambda: ops.merge_tokens(**given), device)

    assert_linear(extra, device)
