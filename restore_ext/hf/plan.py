"""Where every token of a batch of sequences goes when its images are reduced."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restore_ext import profiling
from restore_ext.reduction import Reduction
from restore_ext.rows import sent, take


@dataclass(frozen=True)
class Shortening:
    """B sequences of S tokens become T: text stays, an image's tokens become fewer, padding goes.

    A row shorter than the longest is padded on the left.
    """

    assign: Tensor  # [B, S] int64, the new index of each token; -1 dropped, or padding
    source: Tensor  # [B, T] int64, the index of the token that gives the position; 0 where padded
    valid: Tensor  # [B, T] bool, False where padded
    is_visual: Tensor  # [B, T] bool
    size: Tensor  # [B, T] float32, how many tokens of the prompt each stands for

    def gather(self, x: Tensor) -> Tensor:
        """The last dimension [..., B or 1, S] of x, at the sources: [..., B, T]."""
        x = x.expand(*x.shape[:-2], len(self.source), x.shape[-1])
        return x.gather(-1, self.source.expand(*x.shape[:-1], -1))


@dataclass(frozen=True)
class SequencePlan(Shortening):
    """What became of a batch of prompts on their way into the language model."""

    uniform: Tensor  # [B, T] float32, N / n of its image for a visual token, 1 for others

    def shorten(self, embeds: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings [B, S, C] with the images' reduced tokens [sum of n, C]: [B, T, C]."""
        short = take(embeds, self.source)
        return short.masked_scatter(self.is_visual[..., None], tokens.to(short))


@profiling.range("plan_sequence")
def plan_sequence(
    is_image: Tensor, valid: Tensor, reductions: Sequence[Reduction], lengths: Sequence[int]
) -> SequencePlan:
    """The plan of a batch.

    is_image    [B, S] bool, the tokens of all images, image after image, row after row
    valid       [B, S] bool, False for padding
    reductions  of each image, in that order
    lengths     what is left of each row
    """
    B, S = is_image.shape
    T = max(lengths)
    device = is_image.device
    before = [reduction.group.shape[1] for reduction in reductions]
    after = [reduction.position.shape[1] for reduction in reductions]
    # The vision tower may be on another device than the language model.
    group, position = (x.to(device) for x in _joined(reductions, before, after))
    size = torch.cat([reduction.size[0] for reduction in reductions]).to(device)
    share = sent([n / m for n, m in zip(before, after, strict=True)], device)
    uniform = share.repeat_interleave(sent(after, device), output_size=sum(after))

    # Indices into the flattened batch: of every image token, and of those that stand for a group.
    image = torch.nonzero_static(is_image.flatten(), size=sum(before))[:, 0]
    standing = image[position]
    stays = (valid & ~is_image).flatten().scatter(0, standing, True).view(B, S)
    columns = Columns(stays, T)
    column = columns.column
    joined = torch.where(group < 0, -1, column.flatten()[standing][group])
    assign = torch.where(stays, column, -1).flatten().scatter(0, image, joined).view(B, S)
    one = torch.ones(B * S, device=device)
    return SequencePlan(
        assign=assign,
        source=columns.place(torch.arange(S, device=device), 0),
        valid=columns.valid,
        is_visual=columns.place(is_image, False),
        size=columns.place(one.scatter(0, standing, size).view(B, S), 1.0),
        uniform=columns.place(one.scatter(0, standing, uniform).view(B, S), 1.0),
    )


class Columns:
    """Where the tokens that stay go, [B, S] bool: into T columns, padding first."""

    def __init__(self, stays: Tensor, T: int) -> None:
        length = stays.sum(1, keepdim=True)
        self.column = stays.cumsum(1) - 1 + T - length  # [B, S], of a token that stays
        self.valid = torch.arange(T, device=stays.device) >= T - length  # [B, T]
        self._slot = torch.where(stays, self.column, T)  # the last one collects what does not

    def place(self, per_token: Tensor, elsewhere: float) -> Tensor:
        """[B or none, S] of what stays, in its columns [B, T]; `elsewhere` where padded."""
        B, T = self.valid.shape
        placed = per_token.new_full((B, T + 1), elsewhere)
        return placed.scatter_(1, self._slot, per_token.expand_as(self._slot))[:, :T]


def _joined(
    reductions: Sequence[Reduction], before: Sequence[int], after: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Group and position of all images in one row each, counted through."""
    groups, positions = [], []
    tokens = outputs = 0
    for reduction, n, m in zip(reductions, before, after, strict=True):
        group = reduction.group[0]
        groups.append(torch.where(group < 0, -1, group + outputs))
        positions.append(reduction.position[0] + tokens)
        tokens, outputs = tokens + n, outputs + m
    return torch.cat(groups), torch.cat(positions)
