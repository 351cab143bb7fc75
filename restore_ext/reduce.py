"""The method as a short story told in ops: select, score, assign, merge, sort."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restore_ext import checks, ops
from restore_ext.methods import METHODS, Method, Problem, find_method
from restore_ext.reduction import Reduction
from restore_ext.rows import take, where_true

__all__ = ["ANCHOR_MODES", "DEFAULT_ANCHOR_MODE", "Reduction", "reduce_tokens"]

ANCHOR_MODES = ("paper", "official", "uniform")
DEFAULT_METHOD = "vispruner"
DEFAULT_KEEP = 64  # visual tokens, of the commands and the server
DEFAULT_RETAIN = 0.5
DEFAULT_ANCHOR_MODE = "paper"


def reduce_tokens(
    features: Tensor,
    *,
    keep: int | list[int] | tuple[int, ...] | Tensor | None = None,
    keep_ratio: float | None = None,
    method: str = DEFAULT_METHOD,
    metric: Tensor | None = None,
    scores: Tensor | None = None,
    valid: Tensor | None = None,
    size: Tensor | None = None,
    restore: bool = True,
    retain: float = DEFAULT_RETAIN,
    anchor_mode: str = DEFAULT_ANCHOR_MODE,
    seed: int = 0,
    check_finite: bool | None = None,
    **options: Any,
) -> Reduction:
    """Reduces the visual tokens of every image to a budget (RESTORE, arXiv 2606.01711, section 3).

    With `restore`, the base method picks int(retain * keep) tokens that stay as they are. All
    others are merged into the most similar of keep - int(retain * keep) distinctive anchors, chosen
    among them (Eq. 5), and a merged token stands at the lower median of its members. Nothing is
    dropped, so sizes are conserved; but retain = 1 leaves no anchors, and drops like the plain
    method. Without `restore`, the base method picks `keep` tokens and the others are dropped.
    `tome` and `token_pooling` merge either way, by their own rule; `visionzip` does so without
    `restore`. Then a token of one member is kept, the others are merged.

    features      [B, N, C] float32, bfloat16 or float16: what is reduced; anchors compare it
    keep          tokens to keep, >= 1: an int, or one per image (list, tuple, int tensor [B]);
                  an image with no more valid tokens than that comes back as it is, bit for bit
    keep_ratio    instead of keep: a share in (0, 1] of an image's n valid tokens,
                  max(1, round(keep_ratio * n))
    method        random, uniform, divprune, fastervlm, vispruner, holov, visionzip, tome or
                  token_pooling; see restore_ext.methods and docs/methods.md
    metric        [B, N, Cm] float32, bfloat16 or float16: what the base method compares (CLIP
                  features, keys); features by default
    scores        [B, N] floating: importance, higher is better (attention of the CLS token, for
                  token_pooling attention received); fastervlm, vispruner, holov, visionzip and
                  token_pooling need it
    valid         [B, N] bool; a False token takes no part: the result of a row is that of the row
                  without it
    size          [B, N] float32, > 0: how many tokens each stands for already; ones by default. It
                  weights features and sums, not positions: a merged token stands at the lower
                  median of those that merge here, one vote each
    restore       merge what the base method would drop
    retain        the share of the budget the base method picks, in [0, 1]
    anchor_mode   "paper" (Eq. 5) or "official" (the released code's mask), see ops.score_anchors;
                  "uniform": evenly spaced among the rest, to measure the others against
    seed          for method random: the picks depend on it and on n alone
    check_finite  refuse NaN and Inf in features, metric and scores, and sizes that are not positive
                  and finite, at valid tokens. None: on CPU; True: always; False: never. Unchecked,
                  such a vector ranks below every other.
    options       vispruner: important_ratio=0.5, step=8; holov: num_chunks=16; tome: share=0.5;
                  visionzip: contextual_ratio=10 / 64; token_pooling: algorithm="medoids" or
                  "means", iterations=5

    returns  Reduction, tokens in rising position. Ties go to the lowest index, and every run gives
             the same bits. Which tokens go where has no gradient; the tokens have one with respect
             to features: where features need it, the merge runs in plain torch.
    raises   TypeError, ValueError: naming the argument, what was wanted and what came, before any
             work is done

    Where `valid` is absent, `keep` one int and check_finite not True, nothing is read back from a
    GPU; with check_finite=False it compiles into one graph.
    """
    chosen = find_method(method, options)
    if method not in METHODS:
        raise ValueError(
            f"method {method} acts {chosen.place}, so attach() alone can do it; got features"
        )
    checks.require_features("features", features)
    checks.require_kernels("features", features.device)
    B, N, _ = features.shape
    budgets = checks.require_budgets(keep, keep_ratio, B)
    checks.require_flag("restore", restore)
    retain = checks.require_share("retain", retain)
    checks.require_one_of("anchor_mode", anchor_mode, ANCHOR_MODES)
    seed = checks.require_int("seed", seed)
    if check_finite is not None:
        checks.require_flag("check_finite", check_finite)
    if chosen.needs_scores and scores is None:
        raise ValueError(f"scores must be given for method {method}, a tensor [B, N]; got None")
    _check_tensors(features, metric, scores, valid, size, check_finite)

    if size is None:
        size = torch.ones(B, N, device=features.device)
    problem = Problem(
        metric=(features if metric is None else metric).detach(),
        scores=torch.zeros_like(size) if scores is None else scores.detach().float(),
        size=size.detach(),
        seed=seed,
    )
    counts = [N] * B if valid is None else valid.sum(1).tolist()
    if isinstance(budgets, float):
        budgets = [max(1, round(budgets * n)) for n in counts]
    task = _Task(chosen, options, restore, retain, anchor_mode)
    rows_of: dict[tuple[int, int], list[int]] = {}
    for b, (n, budget) in enumerate(zip(counts, budgets, strict=True)):
        rows_of.setdefault((n, min(n, budget)), []).append(b)
    if len(rows_of) == 1 and counts[0] == N:
        return task.reduce(features, problem, min(N, budgets[0]))
    return _reduce_ragged(task, features, problem, valid, rows_of)


@dataclass(frozen=True)
class _Task:
    method: Method
    options: dict[str, Any]
    restore: bool
    retain: float
    anchor_mode: str

    def reduce(self, features: Tensor, problem: Problem, keep: int) -> Reduction:
        """The story, for images of N valid tokens each and one budget."""
        B, N, _ = features.shape
        if keep >= N:
            return Reduction.untouched(features, problem.size)
        if self.method.merges(self.restore):
            assert self.method.merge is not None
            group = self.method.merge(problem, keep, **self.options)
            members = group.new_zeros(B, keep).scatter_add(1, group, torch.ones_like(group))
            return Reduction.of_groups(features, group, keep, problem.size, members == 1)

        retained = int(self.retain * keep) if self.restore else keep
        group = torch.full((B, N), -1, device=features.device)
        if retained:
            assert self.method.select is not None
            picks = self.method.select(problem, retained, **self.options)
            group.scatter_(1, picks, torch.arange(retained, device=group.device).expand_as(picks))
        if retained < keep:
            x, rest = features.detach(), group < 0
            anchors = self._anchors(x, keep - retained, rest, N - retained)
            cluster = ops.assign_anchors(x, anchors, valid=rest)
            group = torch.where(rest, retained + cluster, group)
        kept = (torch.arange(keep, device=group.device) < retained).expand(B, keep)
        return Reduction.of_groups(features, group, keep, problem.size, kept)

    def _anchors(self, x: Tensor, count: int, rest: Tensor, left: int) -> Tensor:
        """`count` anchors [B, count] among the `left` tokens that rest [B, N] marks in a row."""
        if self.anchor_mode != "uniform":
            return ops.select_anchors(x, count, mode=self.anchor_mode, valid=rest)
        middle = (2 * torch.arange(count, device=x.device) + 1) * left // (2 * count)
        return where_true(rest, left)[:, middle]


def _reduce_ragged(
    task: _Task,
    features: Tensor,
    problem: Problem,
    valid: Tensor | None,
    rows_of: dict[tuple[int, int], list[int]],
) -> Reduction:
    """Rows of the same number of tokens and budget go together, without what is not valid."""
    B, N, C = features.shape
    M = max((keep for _, keep in rows_of), default=0)
    tokens = features.new_zeros(B, M, C)
    size = problem.size.new_zeros(B, M)
    position = torch.full((B, M), -1, device=features.device)
    group = torch.full((B, N), -1, device=features.device)
    kept, merged = (torch.zeros_like(position, dtype=torch.bool) for _ in range(2))
    everything = torch.ones(B, N, dtype=torch.bool, device=features.device)
    for (n, keep), rows in rows_of.items():
        row = torch.tensor(rows, device=features.device)
        index = where_true((everything if valid is None else valid)[row], n)  # [b, n]
        part = task.reduce(
            take(features[row], index),
            Problem(
                metric=take(problem.metric[row], index),
                scores=take(problem.scores[row], index),
                size=take(problem.size[row], index),
                seed=problem.seed,
            ),
            keep,
        )
        tokens[row, :keep] = part.tokens
        size[row, :keep] = part.size
        position[row, :keep] = index.gather(1, part.position)
        group[row[:, None], index] = part.group
        kept[row, :keep] = part.kept
        merged[row, :keep] = part.merged
    return Reduction(tokens, size, position, group, kept, merged)


def _check_tensors(
    features: Tensor,
    metric: Tensor | None,
    scores: Tensor | None,
    valid: Tensor | None,
    size: Tensor | None,
    check_finite: bool | None,
) -> None:
    if metric is not None:
        checks.require_features("metric", metric, features.shape[:2])
        checks.require_device("metric", metric, features)
    if scores is not None:
        checks.require_per_token("scores", scores, features, *checks.FLOATING, torch.float64)
    if valid is not None:
        checks.require_per_token("valid", valid, features, torch.bool)
    if size is not None:
        checks.require_per_token("size", size, features, torch.float32)
    if check_finite is False or (check_finite is None and features.device.type != "cpu"):
        return
    checks.require_finite("features", features, valid)
    if metric is not None:
        checks.require_finite("metric", metric, valid)
    if scores is not None:
        checks.require_finite("scores", scores, valid)
    if size is not None:
        checks.require_finite("size", size, valid, positive=True)
