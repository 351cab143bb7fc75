"""The tokens of one forward as the layers from some depth on have them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from restore_ext.hf.cache import Side
from restore_ext.hf.plan import SequencePlan, Shortening
from restore_ext.hf.settings import Settings
from restore_ext.hf.visible import Blocks


@dataclass(frozen=True)
class View:
    """What is left of B rows of S tokens: T of them, some of which stand for several."""

    positions: Tensor  # [..., B, T] as the model takes them, of the sequence before any reduction
    valid: Tensor  # [B, T] bool, False where padded
    size: Tensor  # [B, T] float32
    lag: Tensor  # [B, T] int64, tokens of this forward that are gone before each
    dropped: Tensor  # [B] int64, tokens of this forward that are gone
    is_visual: Tensor | None = None  # [B, T] bool
    uniform: Tensor | None = None  # [B, T] float32, sizes in layer 0
    block: Tensor | None = None  # [B, T] int64, see Family.blocks

    @staticmethod
    def of(
        plan: SequencePlan | None, positions: Tensor, valid: Tensor, block: Tensor | None = None
    ) -> "View":
        """The tokens that go into the language model.

        positions  [..., B or 1, S], valid and block [B, S]: of those it was given, before the plan
        """
        B, S = valid.shape
        whole = View(
            positions.expand(*positions.shape[:-2], B, S),
            valid,
            torch.ones(B, S, device=valid.device),
            valid.new_zeros(B, S, dtype=torch.int64),
            valid.new_zeros(B, dtype=torch.int64),
            block=block,
        )
        return whole if plan is None else whole.then(plan, plan.uniform)

    def then(self, step: Shortening, uniform: Tensor | None = None) -> "View":
        """What `step` leaves of it."""
        before, left = self.valid.cumsum(1), step.valid.cumsum(1)
        return View(
            step.gather(self.positions),
            step.valid,
            step.size,
            step.gather(self.lag) + step.gather(before) - left,
            self.dropped + before[:, -1] - left[:, -1],
            step.is_visual,
            uniform,
            None if self.block is None else step.gather(self.block).masked_fill(~step.valid, -1),
        )

    @cached_property
    def blocks(self) -> Blocks | None:
        return None if self.block is None else Blocks.of(self.block)

    def counted(self, settings: Settings, past: Side | None) -> Tensor:
        """The positions behind keys of which `past` is known; re-indexed ones are without gaps."""
        if settings.positions != "reindex":
            return self.positions
        shift = 0 if past is None else past.shift[:, None]
        return (self.positions - shift - self.lag).clamp(min=0)

    def side(self, settings: Settings, axes: int, past: Side | None, layer: int) -> Side:
        """What to know of these tokens as keys of a layer, behind keys of which `past` is known."""
        sizes = self.size
        if layer == 0 and self.uniform is not None and settings.layer0 == "uniform":
            sizes = self.uniform
        log_size = sizes.log() if settings.sizes else torch.zeros_like(sizes)
        return Side(
            log_size.masked_fill(~self.valid, float("-inf")),
            by_axis(self.counted(settings, past), axes, len(self.valid)).int(),
            self.dropped,
            self._reduced,
        )

    @cached_property
    def _reduced(self) -> Tensor:
        return self.dropped > 0


def side_before(
    count: int, mask: Tensor | None, positions: Tensor, valid: Tensor, axes: int, distance: bool
) -> Side:
    """What there is to know of `count` keys that stock cached before the first reduction.

    They are text, or images within their budget: their positions count back from the first new
    one. With M-RoPE an image breaks that count, which shows, and is refused where it matters.
    """
    B = len(valid)
    old = valid.new_ones(B, count) if mask is None else mask[:, :count].bool().to(valid.device)
    first = valid.int().argmax(1)[:, None, None].expand(B, axes, 1)
    start = by_axis(positions, axes, B).gather(-1, first)  # [B, G, 1]
    if axes > 1 and distance and bool((start[:, 0, 0] != old.sum(1)).any()):
        raise NotImplementedError(
            "past_key_values holds an image that was not reduced, and the positions of its tokens "
            "are unknown; use calibrate='size', or keep fewer tokens of that image too"
        )
    to_the_end = old.flip(1).cumsum(1).flip(1)
    log_size = torch.zeros(B, count, device=valid.device).masked_fill(~old, float("-inf"))
    nothing = torch.zeros(B, dtype=torch.int64, device=valid.device)
    return Side(log_size, (start - to_the_end[:, None]).int(), nothing, nothing.bool())


def by_axis(positions: Tensor, axes: int, B: int) -> Tensor:
    """[B, G, S] from positions as models take them: [B or 1, S], or of rank 3 with one axis, those
    of M-RoPE, or those and the text's before them."""
    given = positions[-axes:] if positions.dim() == 3 else positions[None]
    return given.expand(axes, B, -1).transpose(0, 1)
