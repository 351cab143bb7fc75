"""Every method again: one image, plain loops, float64, and no line of the package.

`reduce` says which inputs each output token stands for. `Tally.closest` is the smallest gap by
which any of its decisions fell: where that is within the rounding of float32, another answer is as
right.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass
class Tally:
    closest: float = float("inf")

    def fell_by(self, gap, scale=1.0):
        self.closest = min(self.closest, abs(gap) / max(abs(scale), 1.0))


@dataclass
class Cluster:
    members: list  # ascending
    kept: bool
    token: np.ndarray = None
    size: float = 0.0

    @property
    def position(self):
        return self.members[(len(self.members) - 1) // 2]


def reduce(
    x, keep, method, *, metric=None, scores=None, size=None, restore=True, retain=0.5,
    anchor_mode="paper", seed=0, tally=None, **options,
):  # fmt: skip
    """Clusters in rising position, for x [N, C]; what is dropped is in none."""
    tally = tally or Tally()
    n = len(x)
    metric = x if metric is None else metric
    size = np.ones(n) if size is None else size
    if keep >= n:
        clusters = [Cluster([i], True) for i in range(n)]
    elif method in ("tome", "token_pooling") or (method == "visionzip" and not restore):
        if method == "tome":
            groups = tome(metric, keep, size, tally, **options)
        elif method == "visionzip":
            groups = visionzip(metric, keep, scores, tally, **options)
        else:
            groups = token_pooling(metric, keep, scores, tally, **options)
        clusters = [Cluster(sorted(g), len(g) == 1) for g in groups]
    else:
        retained = int(retain * keep) if restore else keep
        picks = base(method, metric, retained, scores, seed, tally, **options) if retained else []
        clusters = [Cluster([i], True) for i in picks]
        if retained < keep:
            rest = [i for i in range(n) if i not in picks]
            found = anchors([x[i] for i in rest], keep - retained, anchor_mode, tally)
            members = {a: [] for a in found}
            for i in range(len(rest)):
                here = i if i in members else nearest([x[j] for j in rest], i, found, tally)
                members[here].append(rest[i])
            clusters += [Cluster(members[a], False) for a in found]
    for c in clusters:
        c.size = sum(size[i] for i in c.members)
        c.token = sum(size[i] * x[i] for i in c.members) / c.size
    return sorted(clusters, key=lambda c: c.position)


def base(method, metric, budget, scores, seed, tally, **options):
    if method == "random":
        return random(len(metric), budget, seed)
    if method == "uniform":
        return [int((i + 0.5) * len(metric) / budget) for i in range(budget)]
    if method == "divprune":
        return divprune(metric, budget, tally)
    if method in ("fastervlm", "visionzip"):
        return by_falling(scores)[:budget]
    if method == "vispruner":
        return vispruner(metric, budget, scores, tally, **options)
    return holov(metric, budget, scores, tally, **options)


def cosine(a, b):
    lengths = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(a @ b / lengths) if lengths > 0 else 0.0


def best(values, tally):
    """The lowest index of the largest value."""
    at = max(range(len(values)), key=lambda i: (values[i], -i))
    for i, value in enumerate(values):
        if i != at and value != values[at]:  # equal means the same arithmetic: the index decides
            tally.fell_by(values[at] - value)
    return at


def by_falling(values):
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def anchors(x, k, mode, tally):
    n = len(x)
    if k in (1, n):  # one group or all alone: which are chosen changes nothing
        return list(range(k))
    if mode == "uniform":
        return [int((i + 0.5) * n / k) for i in range(k)]
    density = [sum(cosine(x[i], x[j]) for j in range(n)) for i in range(n)]
    score = []
    for i in range(n):
        highest = None
        for j in range(n):
            if j != i:
                tally.fell_by(density[j] - density[i])
            denser = density[j] > density[i] if mode == "paper" else density[j] < density[i]
            if denser and (highest is None or cosine(x[i], x[j]) > highest):
                highest = cosine(x[i], x[j])
        score.append(density[i] * (1.0 if highest is None else 1.0 - highest))
    order = by_falling(score)
    tally.fell_by(score[order[k - 1]] - score[order[k]], score[order[k]])
    return sorted(order[:k])


def nearest(x, i, found, tally):
    return found[best([cosine(x[i], x[a]) for a in found], tally)]


def random(n, budget, seed):
    mask = 2**64 - 1
    words = []
    for i in range(n):
        word = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        word ^= word >> 31
        words.append(word - 2**64 if word >> 63 else word)
    return sorted(range(n), key=lambda i: words[i])[:budget]


def divprune(x, budget, tally):
    n = len(x)
    apart = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    picks = []
    while len(picks) < budget:
        free = [i for i in range(n) if i not in picks]
        others = picks or range(n)
        reach = [min(apart[j][i] for j in others if j != i) for i in free]
        picks.append(free[best(reach, tally)])
    return picks


def vispruner(x, budget, scores, tally, important_ratio=0.5, step=8):
    order = by_falling(scores)
    important = int(budget * important_ratio)
    picks, residual = order[:important], order[important:]
    diverse = budget - important
    if diverse == 0:
        return picks
    while len(residual) > diverse:
        a, b = residual[::2], residual[1::2]
        similarity = [max(cosine(x[i], x[j]) for j in b) for i in a]
        falling = by_falling(similarity)
        for i, j in pairwise(falling):
            tally.fell_by(similarity[i] - similarity[j])
        drop = min(step, len(residual) - diverse, len(b))
        residual = [a[i] for i in falling[drop:]] + b
    return picks + residual


def holov(x, budget, scores, tally, num_chunks=16):
    n = len(x)
    count = min(num_chunks, n)
    bounds = [c * (n // count) + min(c, n % count) for c in range(count + 1)]
    chunks = [list(range(a, b)) for a, b in pairwise(bounds)]
    weights = [max(chunk_weight(x, scores, chunk), 0.0) for chunk in chunks]
    total = sum(weights)
    shares = [w / total if total > 0 else 1 / count for w in weights]
    order = by_falling(shares)
    for i, j in pairwise(order):
        if weights[i] > 0:  # those cut off at 0 are equal by decree
            tally.fell_by(1 - shares[j] / shares[i])
    for share in shares:
        if share < 1 and round(share * budget):  # w / w is 1, and nothing is rounded below 0
            tally.fell_by(share * budget - round(share * budget), budget)
    allocated = [int(share * budget) for share in shares]
    for c in order[: budget - sum(allocated)]:
        allocated[c] += 1
    overflow = 0
    for c, chunk in enumerate(chunks):
        overflow += max(allocated[c] - len(chunk), 0)
        allocated[c] = min(allocated[c], len(chunk))
    for c in order:
        while overflow and allocated[c] < len(chunks[c]):
            allocated[c] += 1
            overflow -= 1
    picks = []
    for c, chunk in enumerate(chunks):
        falling = by_falling([scores[i] for i in chunk])
        picks += [chunk[i] for i in falling[: allocated[c]]]
    return picks


def chunk_weight(x, scores, chunk):
    p = len(chunk)
    attention = [1000 * scores[i] for i in chunk]
    unit = [x[i] / (np.sqrt(x[i] @ x[i]) + 1e-6) for i in chunk]
    variance = []
    for i in range(p):
        row = [float(unit[i] @ unit[j]) if i != j else 0.0 for j in range(p)]
        mean = sum(row) / max(p - 1, 1)
        variance.append(sum((s - mean) ** 2 for s in row) / max(p - 1, 1))
    scale = np.mean(np.abs(attention)) / (np.mean(np.abs(variance)) + 1e-6)
    return float(np.mean([a + 0.09 * scale * v for a, v in zip(attention, variance, strict=True)]))


def tome(x, budget, size, tally, share=0.5):
    groups = [[i] for i in range(len(x))]
    while len(groups) > budget:
        n = len(groups)
        r = min(n - budget, n // 2, max(1, int(share * n)))
        mean = [sum(size[i] * x[i] for i in g) / sum(size[i] for i in g) for g in groups]
        even, odd = list(range(0, n, 2)), list(range(1, n, 2))
        found = []
        for e in even:
            similarity = [cosine(mean[e], mean[o]) for o in odd]
            at = best(similarity, tally)
            found.append((similarity[at], odd[at]))
        order = by_falling([similarity for similarity, _ in found])
        if r < len(order):
            tally.fell_by(found[order[r - 1]][0] - found[order[r]][0])
        for e in order[:r]:
            groups[found[e][1]] = groups[found[e][1]] + groups[even[e]]
        gone = {even[e] for e in order[:r]}
        groups = [sorted(g) for i, g in enumerate(groups) if i not in gone]
        groups.sort(key=lambda g: g[(len(g) - 1) // 2])
    return groups


def visionzip(keys, budget, scores, tally, contextual_ratio=0.15625):
    contextual = max(1, int(contextual_ratio * budget))
    dominant = by_falling(scores)[: budget - contextual]
    others = [i for i in range(len(keys)) if i not in dominant]
    step = max(1, len(others) // contextual)
    groups = {others[j * step]: [others[j * step]] for j in range(contextual)}
    targets = list(groups)
    for i in others:
        if i not in targets:
            groups[nearest(keys, i, targets, tally)].append(i)
    return [[i] for i in dominant] + list(groups.values())


def token_pooling(x, budget, scores, tally, algorithm="medoids", iterations=5):
    n = len(x)
    weight = [max(s, 1e-20) for s in scores]
    scale = max(float(a @ a) for a in x)

    def squared(a, b):
        return float((a - b) @ (a - b))

    def cheapest(values):
        at = min(range(len(values)), key=lambda i: (values[i], i))
        for value in values:
            if value != values[at]:
                tally.fell_by((value - values[at]) / scale)
        return at

    def assigned(own, centres):
        clusters = [[i] for i in own]
        for i in range(n):
            if i not in own:
                clusters[cheapest([squared(x[i], c) for c in centres])].append(i)
        return clusters

    own = sorted(by_falling(weight)[:budget])
    centres = [x[i] for i in own]
    for _ in range(iterations):
        found = []
        for cluster in assigned(own, centres):
            cluster = sorted(cluster)
            total = sum(weight[j] for j in cluster)
            if algorithm == "medoids":
                costs = [sum(weight[j] * squared(x[j], x[i]) for j in cluster) for i in cluster]
                holder = cluster[cheapest(costs)]
                found.append((holder, x[holder]))
            else:
                centre = sum(weight[j] / total * x[j] for j in cluster)
                found.append((cluster[cheapest([squared(x[i], centre) for i in cluster])], centre))
        own, centres = zip(*sorted(found, key=lambda pair: pair[0]), strict=True)
    return [sorted(cluster) for cluster in assigned(own, centres)]
