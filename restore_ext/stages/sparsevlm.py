"""SparseVLM: the words that look at the picture say what stays; some of the rest is recycled."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from restore_ext.checks import require_count, require_flag, require_share
from restore_ext.rows import falling, ranks, take
from restore_ext.stages.checks import require_keeps, require_layers
from restore_ext.stages.select import highest
from restore_ext.stages.stage import Candidates, Request, Stage, StageMethod, as_groups

PUBLISHED_LAYERS = (2, 6, 15)  # of 32; tokens leave behind them
PUBLISHED_TOKENS = 576
# Budget of an image of that many tokens -> what stays at each of the three cuts.
PUBLISHED_KEEPS = {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}


def stages(
    request: Request,
    *,
    layers: tuple[int, ...] | None = None,
    keeps: Sequence[int] | None = None,
    recycle: float = 0.3,
    cluster: int = 10,
    neighbours: int = 5,
    merge: bool = True,
) -> tuple[Stage, ...]:
    """SparseVLM (arXiv 2410.04417, version 1 of the released code).

    Raters are the text tokens behind the image that see it more than the average one: with visual
    embeddings V and text embeddings T at the first layer, P the softmax over text of V T', and m
    its mean over V, those with m above the mean of m. A visual token's score is the attention it
    gets from the raters in layer - 1, averaged over heads and raters. At every cut the highest
    scores stay; of the others the best int(recycle * p) + 1 of p are clustered by DPC-KNN into
    int(. / cluster) + 1 tokens, means of their members, and the rest is dropped.

    Where all words see the image alike, all are raters; a prompt that ends with its image is rated
    by its last token. The sequence of the released code has the clusters behind what stays; here
    every cluster stands at the lower median of its members, as a merged token does everywhere.

    keep, keep_ratio  the average over layers that the published keeps make for 576 tokens: 192,
            128, 96 and 64 are the published lists, other budgets lie between them
    layers  of the cuts: behind layers 2, 6 and 15 of 32, so 3, 7 and 16, scaled to the depth
    keeps   what stays at each cut, instead of keep and keep_ratio; clusters come on top
    recycle, cluster, neighbours  see above; neighbours of DPC-KNN's density
    merge   False: what goes is dropped, as in version 2
    """
    if layers is None:
        behind = (min(request.scaled(layer) + 1, request.depth - 1) for layer in PUBLISHED_LAYERS)
        layers = tuple(sorted(set(behind)))
    budget = request.keep is not None or request.keep_ratio is not None
    if keeps is not None and (budget or len(keeps) != len(layers)):
        raise ValueError(
            f"keeps must be one for each of the {len(layers)} layers {list(layers)}, and neither "
            f"keep nor keep_ratio given; got {list(keeps)}, {request.keep}, {request.keep_ratio}"
        )
    if keeps is None and len(layers) > len(PUBLISHED_LAYERS):
        raise ValueError(f"keeps must be given where layers are more than 3, got {list(layers)}")

    def counter(i: int) -> Callable[[int, int], tuple[int, ...]]:
        def counts(n: int, now: int) -> tuple[int, ...]:
            if keeps is not None:
                stay = keeps[i]
            else:
                share = request.share(n, 192 / PUBLISHED_TOKENS)
                stay = max(1, round(published_share(share, i) * n))
            if stay >= now:
                return now, now, 0, 0
            gone = now - stay
            recycled = min(gone, int(recycle * gone) + 1) if merge else 0
            clusters = int(recycled / cluster) + 1 if merge else 0
            return stay + clusters, stay, recycled, clusters

        return counts

    select = partial(_select, neighbours=neighbours) if merge else _keep
    return tuple(
        Stage(layer, counter(i), select, "raters", merges=merge) for i, layer in enumerate(layers)
    )


def published_share(share: float, stage: int) -> float:
    """What stays at a cut, as a share of the tokens at first, for an average budget: linear between
    the published lists, which go on to nothing and to everything."""
    points = {0.0: 0.0, 1.0: 1.0}
    for budget, keeps in PUBLISHED_KEEPS.items():
        points[budget / PUBLISHED_TOKENS] = keeps[stage] / PUBLISHED_TOKENS
    known = sorted(points.items())
    for (low, at_low), (high, at_high) in pairwise(known):
        if share <= high:
            return at_low + (at_high - at_low) * (share - low) / (high - low)
    return 1.0


def _keep(tokens: Candidates) -> Tensor:
    return as_groups(highest(tokens, 1))


def _select(tokens: Candidates, neighbours: int) -> Tensor:
    kept = highest(tokens, 1)
    _, stay, recycled, clusters = tokens.counts
    P, K = tokens.most[2], tokens.most[3]
    group = as_groups(kept)
    if P == 0:
        return group
    rest = tokens.scores.masked_fill(~tokens.valid | kept, float("-inf"))
    best = falling(rest)[:, :P]  # [I, P] the recycled
    exists = torch.arange(P, device=best.device) < recycled[:, None]
    # In raster order, so that ties go to the lowest index.
    best = torch.where(exists, best, rest.shape[1]).sort(1).values
    exists = best < rest.shape[1]
    x = take(tokens.hidden().float(), best.clamp(max=rest.shape[1] - 1))
    cluster = dpc_knn(x, clusters, K, exists, neighbours)
    named = torch.where(exists, stay[:, None] + cluster, -1)
    spare = torch.cat([group, group[:, :1]], 1)
    return spare.scatter(1, best, named)[:, :-1]


def dpc_knn(x: Tensor, k: Tensor, most: int, valid: Tensor, neighbours: int) -> Tensor:
    """Density-peak clusters by k nearest neighbours (DPC-KNN, Du et al. 2016), as in SparseVLM.

        d_ij = |x_i - x_j| / sqrt(C)           density_i = exp(-mean of d_ij^2 over the nearest j)
        delta_i = min d_ij over denser j, the largest d_ij where there is none

    The k tokens with the largest delta * density are centres, and every token joins the nearest.
    The nearest j are min(neighbours, n), i itself among them; a tie in density is won by the lower
    index, where the released code adds noise, and so are all other ties.

    x [I, P, C] float32 or float64, k [I] int64 <= most <= P, valid [I, P] bool
    returns [I, P] int64, the cluster, in 0..k-1; 0 where not valid
    """
    P, C = x.shape[1:]
    pair = valid[:, :, None] & valid[:, None, :]
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / C**0.5
    near = distance.masked_fill(~pair, float("inf")).sort(-1).values[..., : min(neighbours, P)]
    exists = near.isfinite()
    square = near.masked_fill(~exists, 0).square().sum(-1) / exists.sum(-1).clamp(min=1)
    density = -square.masked_fill(~valid, float("inf"))  # its logarithm, which cannot underflow
    place = ranks(falling(density))  # denser tokens come first
    denser = (place[:, None, :] < place[:, :, None]) & pair
    delta = distance.masked_fill(~denser, float("inf")).amin(-1)
    widest = distance.masked_fill(~pair, 0).amax((1, 2))[:, None]
    delta = torch.where(denser.any(-1), delta, widest)
    peak = (delta.log() + density).clamp(min=torch.finfo(x.dtype).min)  # a copy of a denser token
    centre = falling(peak.masked_fill(~valid, float("-inf")))[:, :most]  # [I, most]
    real = torch.arange(most, device=k.device) < k[:, None]
    to_centre = distance.gather(2, centre[:, None, :].expand(-1, P, -1))
    cluster = to_centre.masked_fill(~real[:, None, :], float("inf")).argmin(-1)
    # A centre is its own, whoever lies as near; what a row has too many of falls on a column more.
    own = torch.arange(most, device=k.device).expand_as(centre)
    spare = torch.cat([cluster, cluster[:, :1]], 1)
    return spare.scatter(1, torch.where(real, centre, P), own)[:, :-1]


SPARSEVLM = StageMethod(
    stages,
    {
        "layers": require_layers,
        "keeps": require_keeps,
        "recycle": require_share,
        "cluster": require_count,
        "neighbours": require_count,
        "merge": require_flag,
    },
    reindexes=True,
    restore="positions, calibration",
    does="picks and merges",
    needs="attention of the words that look at the image",
    source="2410.04417",
    about="the highest attention of the words that look at the image; clusters of the next best",
)
