"""Token Pooling: the clusters that cost least when every token is replaced by its centre."""

import torch
from torch import Tensor

from restore_ext import ops
from restore_ext.checks import require_count, require_one_of
from restore_ext.methods.problem import RECEIVED, Method, Problem
from restore_ext.rows import falling

ALGORITHMS = ("medoids", "means")
LEAST_WEIGHT = 1e-20  # what a score of 0 weighs, so that a cluster of such has a centre


def merge(
    problem: Problem, budget: int, *, algorithm: str = "medoids", iterations: int = 5
) -> Tensor:
    """Weighted k-medoids or k-means (Token Pooling, arXiv 2110.03860), squared Euclidean distance.

    A token's weight w is its score, the attention it receives. The first centres are the `budget`
    tokens of the highest weight. A round gives every token to its nearest centre and moves the
    centres, `iterations` times; then every token goes to its nearest centre for good.

        medoids   the centre of a cluster is the member i with the least sum_j w_j |x_j - x_i|^2
        means     the centre is sum_j w_j x_j / sum_j w_j

    Sums run over the members. Ties go to the lowest index, of centres to that of the medoid or, in
    means, the member nearest to the centre; that member never leaves its cluster, so that no
    cluster is ever empty. Either way the token handed on is the mean of its cluster by size, so
    that nothing is dropped; the paper's k-medoids hands on the medoid itself.
    """
    x = problem.metric.float()
    good = x.isfinite().all(-1)
    x = torch.where(good[..., None], x, 0)
    weight = torch.where(good & (problem.scores > LEAST_WEIGHT), problem.scores, LEAST_WEIGHT)
    own = falling(weight)[:, :budget].sort(1).values  # the member that holds each cluster
    apart = _squared_distance(x, x)
    distance = _columns(apart, own)  # [B, N, K] to the centres
    for _ in range(iterations):
        group = _nearest(distance, own)
        if algorithm == "medoids":
            own = _cheapest(_cost(apart, group, weight), group, budget).sort(1).values
            distance = _columns(apart, own)
        else:
            centre, _, _ = ops.merge_tokens(x, group, budget, size=weight)
            distance = _squared_distance(x, centre)
            own = _cheapest(distance.gather(2, group[..., None])[..., 0], group, budget)
            own, order = own.sort(1)
            distance = _columns(distance, order)
    return _nearest(distance, own)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """|x_n - y_k|^2 of x [B, N, C] and y [B, K, C], [B, N, K]."""
    length_x, length_y = x.square().sum(2), y.square().sum(2)
    squared = length_x[:, :, None] + length_y[:, None] - 2 * (x @ y.mT)
    return squared.nan_to_num(nan=float("inf"), posinf=float("inf")).clamp(min=0)


def _columns(distance: Tensor, index: Tensor) -> Tensor:
    """distance [B, N, M] at the columns index [B, K]."""
    return distance.gather(2, index[:, None].expand(-1, distance.shape[1], -1))


def _nearest(distance: Tensor, own: Tensor) -> Tensor:
    """The nearest centre of every token [B, N], that of `own` [B, K] being its cluster's."""
    clusters = torch.arange(own.shape[1], device=own.device).expand_as(own)
    return distance.argmin(2).scatter(1, own, clusters)


def _cost(apart: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """What every token [B, N] would cost as the medoid of its cluster."""
    together = group[:, :, None] == group[:, None]
    return torch.where(together, weight[:, :, None] * apart, 0).sum(1)


def _cheapest(cost: Tensor, group: Tensor, clusters: int) -> Tensor:
    """The member of the lowest cost [B, N] in every cluster, [B, K] rising."""
    B, N = cost.shape
    least = cost.new_full((B, clusters), float("inf")).scatter_reduce(1, group, cost, "amin")
    index = torch.arange(N, device=cost.device).expand_as(group)
    index = torch.where(cost <= least.gather(1, group), index, N)
    return torch.full_like(group[:, :clusters], N).scatter_reduce(1, group, index, "amin")


def _require_algorithm(name: str, value: object) -> None:
    require_one_of(name, value, ALGORITHMS)


TOKEN_POOLING = Method(
    merge=merge,
    scores=RECEIVED,
    options={"algorithm": _require_algorithm, "iterations": require_count},
    source="2110.03860",
    about="clusters of least error, by weighted k-medoids or k-means",
)
