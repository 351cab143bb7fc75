"""Random tokens: the floor every method must beat."""

import torch
from torch import Tensor

from restore_ext.methods.problem import Method, Problem

WORD = 1 << 64
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def select(problem: Problem, budget: int) -> Tensor:
    """The `budget` tokens of the lowest hash of (seed, index): splitmix64, the stream's n-th word.

    A hash and not a generator: the picks depend on the seed and N alone, so they are the same in
    any batch and on any device, and those of a smaller budget are among those of a larger.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    B, N, _ = problem.metric.shape
    word = torch.arange(1, N + 1, device=problem.metric.device) * _signed(GOLDEN)
    word = word + _signed(problem.seed)
    word = (word ^ _shift(word, 30)) * _signed(FIRST)
    word = (word ^ _shift(word, 27)) * _signed(SECOND)
    word = word ^ _shift(word, 31)
    return word.argsort()[:budget].expand(B, budget)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return (word + WORD // 2) % WORD - WORD // 2


def _shift(word: Tensor, bits: int) -> Tensor:
    """The logical right shift, where int64 has the arithmetic one."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


RANDOM = Method(select, about="a fair draw: the floor")
