"""Reduction: companions merged by the same groups, stages composed into one, gradients."""

import pytest
import torch

from restore_ext import Reduction, ops, reduce_tokens
from restore_ext.methods import METHODS


def problem(N=21, C=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, N, C, generator=generator) + 0.3
    return x.to(dtype), torch.rand(2, N, generator=generator)


def test_merge_reduces_a_companion_by_the_same_groups():
    x, scores = problem()
    size = 1.0 + torch.arange(42).view(2, 21).float() % 4
    r = reduce_tokens(x, keep=[9, 5], scores=scores, size=size)
    other, _ = problem(C=3, seed=1)
    for weight, given in ((size, size), (torch.ones(2, 21), None)):
        merged = r.merge(other, given)
        assert merged.shape == (2, 9, 3)
        for b in range(2):
            for m in range(9):
                here = r.group[b] == m
                wanted = torch.zeros(3)
                if here.any():
                    w = weight[b, here].double()
                    wanted = (w @ other[b, here].double() / w.sum()).float()
                torch.testing.assert_close(merged[b, m], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(r.merge(x, size), r.tokens, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("then", ["divprune", "tome"])
def test_two_stages_compose_into_one(first, then):
    for restore in (True, False):
        for seed in range(4):
            x, scores = problem(N=40, seed=seed)
            a = reduce_tokens(x, keep=[25, 18], method=first, scores=scores, restore=restore)
            b = reduce_tokens(a.tokens, keep=[9, 11], method=then, valid=a.valid, size=a.size)
            both = a.compose(b)
            check_composed(a, b, both)
            mean = both.merge(x)
            torch.testing.assert_close(mean, both.tokens, rtol=1e-5, atol=1e-5)


def check_composed(a: Reduction, b: Reduction, both: Reduction):
    for i in range(2):
        position = both.position[i][both.valid[i]]
        assert len(position) == b.valid[i].sum() and both.valid[i, : len(position)].all()
        assert (position[1:] > position[:-1]).all()
        padded = slice(len(position), None)
        assert not both.kept[i, padded].any() and not both.merged[i, padded].any()
        clusters = {}
        for n in range(a.group.shape[1]):
            m = int(a.group[i, n])
            last = int(b.group[i, m]) if m >= 0 else -1
            if last >= 0:
                clusters.setdefault(last, []).append(n)
            else:
                assert both.group[i, n] == -1
        assert len(clusters) == len(position)
        for last, members in clusters.items():
            here = position.tolist().index(sorted(members)[(len(members) - 1) // 2])
            assert (both.group[i, members] == here).all()
            assert torch.equal(both.tokens[i, here], b.tokens[i, last])
            assert both.size[i, here] == len(members)
            source = b.position[i, last]
            assert both.kept[i, here] == (b.kept[i, last] and a.kept[i, source])
            assert both.merged[i, here] == (not both.kept[i, here])


def groups_of(group, M, x):
    """A reduction with these groups, made by hand."""
    tokens, size, position = ops.merge_tokens(x, group, M)
    merged = size > 1
    return Reduction(tokens, size, position, group, ~merged, merged)


def test_a_composed_position_is_no_median_of_medians():
    x = torch.arange(9.0).view(1, 9, 1)
    # {0, 1, 2} has 1 and {3, ..., 8} has 5: the lower median of (1, 5) is 1, of all nine it is 4.
    a = groups_of(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]), 2, x)
    b = groups_of(torch.tensor([[0, 0]]), 1, a.tokens)
    assert a.position.tolist() == [[1, 5]] and b.position.tolist() == [[0]]
    assert a.compose(b).position.tolist() == [[4]]


def test_compose_puts_the_tokens_in_order_again():
    x = torch.arange(7.0).view(1, 7, 1)
    a = groups_of(torch.tensor([[0, 0, 0, 1, 2, 0, 0]]), 3, x)  # medians 2, 3, 4
    b = groups_of(torch.tensor([[0, 1, 0]]), 2, a.tokens)  # {0, 1, 2, 4, 5, 6} and {3}
    both = a.compose(b)
    assert both.position.tolist() == [[2, 3]]
    a = groups_of(torch.tensor([[0, 1, 2, 2, 2, 2, 2]]), 3, x)  # medians 0, 1, 4
    b = groups_of(torch.tensor([[0, 1, 0]]), 2, a.tokens)  # {0, 2, ..., 6} and {1}
    both = a.compose(b)
    assert both.position.tolist() == [[1, 3]]  # the later order was the other way round
    assert both.group.tolist() == [[1, 0, 1, 1, 1, 1, 1]]
    assert torch.equal(both.tokens, b.tokens.flip(1))
    assert both.size.tolist() == [[1, 6]] and both.kept.tolist() == [[True, False]]


def test_compose_refuses_what_does_not_follow():
    x, _ = problem()
    a = reduce_tokens(x, keep=[9, 5], method="divprune")
    with pytest.raises(ValueError, match=r"later must reduce \[B, M\] = \[2, 9\] .* \[2, 21\]"):
        a.compose(reduce_tokens(x, keep=3, method="divprune"))
    with pytest.raises(ValueError, match="later must leave out padded tokens"):
        a.compose(reduce_tokens(a.tokens, keep=3, method="divprune"))


@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_have_the_gradient_of_the_mean(method):
    x, scores = problem(N=12, C=3)
    size = 1.0 + torch.arange(24).view(2, 12).float() % 3
    weight = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(9))
    given = {"keep": [5, 3], "method": method, "scores": scores, "size": size}
    x.requires_grad_()
    r = reduce_tokens(x, **given)
    plain = reduce_tokens(x.detach(), **given)
    for name in ("size", "position", "group", "kept", "merged"):
        assert torch.equal(getattr(r, name), getattr(plain, name))
    torch.testing.assert_close(r.tokens.detach(), plain.tokens, rtol=1e-6, atol=1e-6)
    (r.tokens * weight).sum().backward()

    # With its groups fixed the merge is linear, so a difference of any step is the derivative.
    wanted = torch.empty_like(x)
    for b in range(2):
        for n in range(12):
            for c in range(3):
                step = torch.zeros(2, 12, 3)
                step[b, n, c] = 1.0
                wanted[b, n, c] = (plain.merge(step, size) * weight).sum()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_differentiable_merge_is_the_operator(dtype):
    x, scores = problem(N=50, dtype=dtype)
    r = reduce_tokens(x, keep=7, scores=scores, method="tome")
    wanted = r.merge(x)
    x.requires_grad_()
    got = r.merge(x)
    assert got.requires_grad and got.dtype == dtype
    torch.testing.assert_close(got.detach(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(got, r.merge(x))
    with torch.no_grad():
        assert torch.equal(r.merge(x), wanted)


def test_a_gradient_passes_through_pruning_and_through_identity():
    x, scores = problem()
    x.requires_grad_()
    r = reduce_tokens(x, keep=6, scores=scores, restore=False)
    r.tokens.sum().backward()
    assert torch.equal(x.grad[..., 0], (r.group >= 0).float())
    x.grad = None
    reduce_tokens(x, keep=21, scores=scores).tokens.sum().backward()
    assert (x.grad == 1).all()


def test_merge_says_what_is_wrong():
    x, scores = problem()
    r = reduce_tokens(x, keep=5, scores=scores)
    with pytest.raises(ValueError, match=r"x must have shape .* \[2, 21, C\], got \[2, 5, 6\]"):
        r.merge(r.tokens)
    with pytest.raises(TypeError, match=r"size must be torch\.float32"):
        r.merge(x, scores.double())
