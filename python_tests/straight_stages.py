"""The choices of a cut, token by token in plain Python, from the formulas of the papers."""

import math
from fractions import Fraction

import torch


def highest(scores: list[float], keep: int) -> list[int]:
    """The indices of the highest scores, rising; of equals the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:keep])


def evenly(n: int, keep: int) -> list[int]:
    return [(2 * i + 1) * n // (2 * keep) for i in range(keep)]


def strided(n: int, offset: int, stride: int) -> list[int]:
    first = min(offset, n - 1) if n else 0
    return list(range(first, n, stride))


def clusters(x, count: int, neighbours: int) -> list[list[int]]:
    """DPC-KNN of vectors [P, C]: the members of every cluster, by falling peak of its centre."""
    P, C = x.shape
    distance = [
        [math.sqrt(float(((x[i] - x[j]) ** 2).sum())) / math.sqrt(C) for j in range(P)]
        for i in range(P)
    ]
    density = []
    for i in range(P):
        near = sorted(distance[i])[: min(neighbours, P)]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    widest = max(max(row) for row in distance)
    peak = []
    for i in range(P):
        denser = [
            distance[i][j]
            for j in range(P)
            if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        peak.append((min(denser) if denser else widest) * density[i])
    centres = sorted(range(P), key=lambda i: (-peak[i], i))[:count]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(P):
        if i in centres:
            members[centres.index(i)].append(i)
        else:
            nearest = min(range(len(centres)), key=lambda c: (distance[i][centres[c]], c))
            members[nearest].append(i)
    return members


def sparsevlm(
    scores: list[float], x, keep: int, recycle: float, cluster: int, neighbours: int
) -> list[list[int]]:
    """The members of every token left of an image, in the order of their lower medians."""
    n = len(scores)
    if keep >= n:
        return [[i] for i in range(n)]
    kept = highest(scores, keep)
    rest = [i for i in range(n) if i not in kept]
    best = [rest[i] for i in highest([scores[i] for i in rest], int(recycle * len(rest)) + 1)]
    groups = clusters(x[best], int(len(best) / cluster) + 1, neighbours)
    found = [[i] for i in kept] + [[best[i] for i in group] for group in groups]
    return sorted(found, key=lambda group: sorted(group)[(len(group) - 1) // 2])


def raters(visual, text) -> list[int]:
    """Which rows of text [t, C] see visual [v, C] more than the average one; all if none does."""
    share = torch.zeros(len(text), dtype=torch.float64)
    for v in visual.double():
        share += (text.double() @ v).softmax(0) / len(visual)
    chosen = [t for t in range(len(text)) if share[t] > share.mean()]
    return chosen or list(range(len(text)))


def fastv_count(n: int, share: Fraction) -> int:
    """R of n tokens stay, to the nearest (of two the even one); none of an image goes whole."""
    below = math.floor(share * n)
    over = share * n - below
    up = over > Fraction(1, 2) or (over == Fraction(1, 2) and below % 2 == 1)
    return max(1, below + up)


def pyramiddrop_counts(n: int, last: Fraction, cuts: int) -> list[int]:
    """The largest m with m <= n r^i at cut i, r^cuts = last: in whole numbers, m^cuts <= n^cuts
    last^i."""
    counts, now = [], n
    for i in range(1, cuts + 1):
        m = 0
        while (m + 1) ** cuts <= n**cuts * last**i:
            m += 1
        now = min(now, max(1, m))
        counts.append(now)
    return counts


def sparsevlm_counts(
    n: int, share: Fraction, recycle: Fraction, cluster: int
) -> list[tuple[int, int]]:
    """(tokens that stay, clusters) at every cut, on the lines between the published points."""
    published = {0: (0, 0, 0), 64: (66, 30, 17), 96: (238, 48, 26)}
    published |= {128: (303, 110, 36), 192: (300, 200, 110), 576: (576, 576, 576)}
    found, now = [], n
    for cut in range(3):
        lower = max(b for b in published if Fraction(b, 576) <= share)
        upper = min(b for b in published if Fraction(b, 576) >= share)
        at = Fraction(published[lower][cut])
        if upper > lower:
            way = (share * 576 - lower) / (upper - lower)
            at += way * (published[upper][cut] - published[lower][cut])
        stay = fastv_count(n, at / 576)
        if stay >= now:
            found.append((now, 0))
            continue
        gone = now - stay
        recycled = min(gone, math.floor(recycle * gone) + 1)
        found.append((stay, math.floor(Fraction(recycled, cluster)) + 1))
        now = sum(found[-1])
    return found
