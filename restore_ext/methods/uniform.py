"""Evenly spaced tokens in raster order."""

import torch
from torch import Tensor

from restore_ext.methods.problem import Method, Problem


def select(problem: Problem, budget: int) -> Tensor:
    """Token floor((2 i + 1) N / (2 budget)), i = 0..budget-1: middles of equal parts."""
    B, N, _ = problem.metric.shape
    odd = 2 * torch.arange(budget, device=problem.metric.device) + 1
    return (odd * N // (2 * budget)).expand(B, budget)


UNIFORM = Method(select, about="evenly spaced in raster order")
