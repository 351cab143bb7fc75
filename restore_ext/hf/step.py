"""One cut inside the language model: counted beforehand, made when its scores are there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from restore_ext import profiling
from restore_ext.checks import why_no_kernels
from restore_ext.hf.images import for_operators
from restore_ext.hf.plan import Columns, Shortening
from restore_ext.hf.view import View
from restore_ext.reduction import Reduction, merge_groups
from restore_ext.rows import sent, take
from restore_ext.stages import Candidates, Stage


@dataclass(frozen=True)
class PlannedStage:
    """A stage and the numbers of this batch, on the host and on the device: nothing is read back
    or sent over once the layers run."""

    stage: Stage
    before: list[int]  # tokens of each image
    most: tuple[int, ...]
    length: int  # of the longest row, afterwards
    after: list[int]
    numbers: Tensor  # [2 + counts, I] int64: before, whether the image is spared, Stage.counts
    spares: bool  # whether any is


def plan_stages(
    stages: Sequence[Sequence[Stage]],
    first: Sequence[int],
    spared: Sequence[bool],
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    device: torch.device,
) -> list[PlannedStage]:
    """The cuts that drop anything of these images.

    stages   of each image; they differ in their counts alone
    first    tokens of each image at the first layer; spared: whether it keeps them to the last
    rows     the images of each row
    lengths  tokens of each row at the first layer
    """
    planned: list[PlannedStage] = []
    now, left = list(first), list(lengths)
    for cut in zip(*stages, strict=True):
        counts = [
            (m, *stage.counts(n, m)[1:]) if whole else stage.counts(n, m)
            for stage, n, m, whole in zip(cut, first, now, spared, strict=True)
        ]
        after = [count[0] for count in counts]
        if after == now:
            continue
        gone = [m - a for m, a in zip(now, after, strict=True)]
        left = [n - sum(gone[i] for i in images) for n, images in zip(left, rows, strict=True)]
        columns = list(zip(*counts, strict=True))
        numbers = sent([now, list(spared), *map(list, columns)], device)
        most = tuple(map(max, columns))
        planned.append(PlannedStage(cut[0], now, most, max(left), after, numbers, any(spared)))
        now = after
    return planned


@dataclass(frozen=True)
class Step(Shortening):
    """A cut that was made, which can be made again on other hidden states of the same sequence."""

    slots: Tensor  # [I, N] int64, the tokens of every image in the flattened [B * S], B * S: none
    reduction: Reduction | None  # of the images, without their tokens; None where none merge
    weight: Tensor  # [I, N] float32, their sizes before

    @profiling.range("cut_hidden_states")
    def shorten(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, S, C]: [B, T, C]. A token left alone keeps its bits."""
        if self.reduction is not None:
            hidden = self._merged(hidden, self.reduction)
        return take(hidden, self.source.to(hidden.device))

    def _merged(self, hidden: Tensor, reduction: Reduction) -> Tensor:
        """[B, S, C] with the mean of every cluster at the token that stands for it."""
        x = for_operators(rows_of(hidden, self.slots))
        group, position = reduction.group.to(x.device), reduction.position.to(x.device)
        means = merge_groups(x, group, position.shape[1], self.weight.to(x.device))[0]
        (B, S, C), N = hidden.shape, self.slots.shape[1]
        at = padded(self.slots, B * S).gather(
            1, torch.where(reduction.merged, reduction.position, N)
        )
        flat = torch.cat([hidden.flatten(0, 1), hidden.new_zeros(1, C)])
        flat = flat.index_copy(0, at.flatten().to(hidden.device), means.flatten(0, 1).to(hidden))
        return flat[:-1].view_as(hidden)


@profiling.range("plan_cut")
def make_step(planned: PlannedStage, view: View, hidden: Tensor, scores: Tensor | None) -> Step:
    """The cut of hidden states [B, S, C] that a stage makes.

    scores  [B, S] float32; None for a stage that has none
    """
    home = view.valid.device
    device = home if why_no_kernels(home) is None else torch.device("cpu")
    assert view.is_visual is not None
    is_visual, valid = view.is_visual.to(device), view.valid.to(device)
    numbers, size = planned.numbers.to(device), view.size.to(device)
    slots = _slots(is_visual, numbers[0], planned.before)
    weight = _at(size, slots)

    def images() -> Tensor:
        return for_operators(rows_of(hidden.detach(), slots)).to(device)

    candidates = Candidates(
        scores=torch.zeros_like(weight) if scores is None else _at(scores.to(device), slots),
        valid=slots < valid.numel(),
        size=weight,
        counts=tuple(numbers[2:]),
        most=planned.most,
        hidden=images,
    )
    group = planned.stage.select(candidates)
    if planned.spares:
        alone = torch.arange(group.shape[1], device=device).expand_as(group)
        group = torch.where(numbers[1, :, None] > 0, alone, group)
    group = torch.where(candidates.valid, group, -1)
    reduction = _reduction(group, planned.most[0], weight)
    left = _shortening(reduction, slots, is_visual, valid, size, planned.length)
    return Step(
        **{name: tensor.to(home) for name, tensor in left.items()},
        slots=slots,
        reduction=reduction if planned.stage.merges else None,
        weight=weight,
    )


def _slots(is_visual: Tensor, before: Tensor, counts: Sequence[int]) -> Tensor:
    """[I, N] int64, where the tokens of every image are in the flattened [B * S]; B * S beyond its
    own `before` [I] tokens, of which the host knows the counts."""
    image = torch.nonzero_static(is_visual.flatten(), size=sum(counts))[:, 0]
    index = torch.arange(max(counts), device=image.device)
    at = (before.cumsum(0) - before)[:, None] + index
    found = image[at.clamp(max=len(image) - 1)]
    return torch.where(index < before[:, None], found, is_visual.numel())


def _reduction(group: Tensor, M: int, weight: Tensor) -> Reduction:
    """Who joins whom, from group [I, N]: of one channel of nothing, for sizes and positions."""
    alone = torch.zeros(len(group), M + 1, dtype=torch.int64, device=group.device)
    members = (group >= 0).long()
    alone = alone.scatter_add(1, torch.where(group < 0, M, group), members)[:, :M] == 1
    return Reduction.of_groups(torch.zeros_like(weight)[..., None], group, M, weight, alone)


def _shortening(
    reduction: Reduction,
    slots: Tensor,
    is_visual: Tensor,
    valid: Tensor,
    size: Tensor,
    length: int,
) -> dict[str, Tensor]:
    """The fields of a Shortening to `length` columns: text stays, and what stands for a group."""
    (B, S), (M, N) = valid.shape, (reduction.position.shape[1], slots.shape[1])
    left = reduction.valid
    standing = padded(slots, B * S).gather(1, torch.where(left, reduction.position, N))

    def put(per_token: Tensor, at: Tensor, values: Tensor) -> Tensor:
        """[B, S] with values at some tokens; what is at B * S goes nowhere."""
        flat = torch.cat([per_token.flatten(), per_token.new_zeros(1)])
        return flat.scatter(0, at.flatten(), values.flatten())[:-1].view(B, S)

    stays = put(valid & ~is_visual, standing, left)
    columns = Columns(stays, length)
    column = torch.where(stays, columns.column, -1)
    joined = torch.where(reduction.group < 0, M, reduction.group)
    joined = padded(_at(column, standing), -1).gather(1, joined)
    return {
        "assign": put(column, slots, joined),
        "source": columns.place(torch.arange(S, device=valid.device), 0),
        "valid": columns.valid,
        "is_visual": columns.place(is_visual, False),
        "size": columns.place(put(size, standing, reduction.size), 1.0),
    }


def padded(x: Tensor, value: int) -> Tensor:
    """x [I, N] with one more column."""
    return pad(x, (0, 1), value=value)


def rows_of(x: Tensor, slots: Tensor) -> Tensor:
    """Tokens [I, N, C] at `slots` of x [B, S, C]; zeros where there is none."""
    flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[2])])
    return flat[slots.to(x.device)]


def _at(x: Tensor, slots: Tensor) -> Tensor:
    """x [B, S] at slots [I, N]; 0 where there is none."""
    return torch.cat([x.flatten(), x.new_zeros(1)])[slots]
