"""A batch of sequences cut down: its plan, and what attention is told of the keys left."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restore_ext.hf.cache import RestoreLayer, Side
from restore_ext.hf.families import Family
from restore_ext.hf.images import images_of_rows, reduce_images, without_separators
from restore_ext.hf.plan import SequencePlan, plan_sequence
from restore_ext.hf.report import ImageReport, LayerReport, Report
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import Seen
from restore_ext.reduction import Reduction


@dataclass(frozen=True)
class Cut:
    plan: SequencePlan
    rows: list[list[int]]  # the images of each row
    reductions: list[Reduction]  # of each image
    tokens: Tensor  # [sum of n, C], the images' reduced tokens
    is_image: Tensor  # [B, S] bool
    dropped: Tensor  # [B] int64, how much shorter each row became
    reach: int  # one more than the highest position
    behind: int  # tokens behind the last image, in every row

    def report(
        self, family: Family, dtype: torch.dtype, layers: Sequence[RestoreLayer], logical: int
    ) -> Report:
        """layers: of the cache, before this sequence, whose logical length is given too."""
        B, S = self.plan.assign.shape
        before, after = logical + S, self.plan.source.shape[1]
        after += layers[0].physical if layers else 0
        per_token = B * family.kv_size * dtype.itemsize
        count = len(family.lm.layers)
        return Report(
            images=self._images(),
            layers=[LayerReport(before, after, after * per_token)] * count,
            plan=self.plan,
            kv_bytes=after * per_token * count,
            # Stock drops what a window of w tokens no longer needs: all but the last w - 1.
            kv_bytes_stock=per_token
            * sum(min(before, (w or before + 1) - 1) for w in family.windows),
        )

    def _images(self) -> list[ImageReport]:
        sizes = [reduction.group.shape[1] for reduction in self.reductions]
        columns = torch.nonzero_static(self.is_image, size=sum(sizes))[:, 1]
        first = [sum(sizes[:image]) for image in range(len(sizes))]
        starts = columns[torch.tensor(first, device=columns.device)].tolist()
        reports = []
        for row, images in enumerate(self.rows):
            for image in images:
                reduction = self.reductions[image]
                after = reduction.position.shape[1]
                reports.append(ImageReport(row, starts[image], sizes[image], after, reduction))
        return reports


def cut_sequence(
    features: list[Tensor],
    seen: Seen,
    settings: Settings,
    *,
    is_image: Tensor,
    valid: Tensor,
    positions: Tensor,
    encoded_once: bool,
    refuse: Callable[[], None],
) -> Cut | None:
    """Reduces the images of a batch; None if all are within their budgets.

    is_image, valid [B, S] bool; positions [..., B or 1, S]
    refuse  called before any reduction is made: raises where a shorter sequence cannot be had
    """
    B, S = is_image.shape
    past_image = torch.where(is_image, torch.arange(1, S + 1, device=is_image.device), 0).amax(1)
    per_row = [is_image.sum(1), valid.sum(1), past_image, positions.amax().expand(B)]
    counts = torch.stack(per_row).tolist()  # the one wait for the device
    rows = images_of_rows(counts[0], [len(image) for image in features])
    features, is_image = without_separators(features, seen, rows, is_image)
    reductions = reduce_images(
        features, seen, rows, settings, encoded_once=encoded_once, refuse=refuse
    )
    if reductions is None:
        return None
    gone = [r.group.shape[1] - r.position.shape[1] for r in reductions]
    dropped = [sum(gone[image] for image in images) for images in rows]
    lengths = [n - d for n, d in zip(counts[1], dropped, strict=True)]
    tokens = torch.cat([reduction.tokens[0] for reduction in reductions])
    return Cut(
        plan_sequence(is_image, valid, reductions, lengths),
        rows,
        reductions,
        tokens,
        is_image,
        torch.tensor(dropped, device=is_image.device),
        reach=int(counts[3][0]) + 1,
        behind=S - max(counts[2]),
    )


def padding_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """[B, S] bool from the attention mask of a forward of embeddings `like` [B, S, C]."""
    B, S, _ = like.shape
    if mask is None:
        return torch.ones(B, S, dtype=torch.bool, device=like.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < S:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask must be [B, L] with L >= S = {S} where images are reduced, got {got}: "
            "a mask of pairs of tokens cannot be shortened"
        )
    return mask[:, -S:].bool().to(like.device)


def new_side(
    cut: Cut | None,
    positions: Tensor,
    valid: Tensor,
    past: Side | None,
    settings: Settings,
    axes: int,
) -> tuple[Side, Side, Tensor]:
    """What to know of the keys of a forward.

    positions  [..., B or 1, S] as the model was given them; past: what came before

    returns  the Side of layer 0, that of the other layers, and the positions of the T tokens left
    """
    B, S = valid.shape
    positions = positions.expand(*positions.shape[:-2], B, S)
    nothing = torch.zeros(B, dtype=torch.int64, device=valid.device)
    lag = nothing if past is None else past.shift
    dropped, size, uniform, left = nothing, None, None, valid
    if cut is not None:
        plan = cut.plan
        dropped, size, uniform, left = cut.dropped, plan.size, plan.uniform, plan.valid
        positions = plan.gather(positions)
        # Tokens before this one in its row, less those that are left of them.
        lag = lag[:, None] + plan.gather(valid.cumsum(1)) - left.cumsum(1)
    else:
        lag = lag[:, None]
    if settings.positions == "reindex":
        positions = (positions - lag).clamp(min=0)

    position = _axes(positions, axes, B).int()
    reduced = dropped > 0

    def side(size: Tensor | None) -> Side:
        log_size = torch.zeros_like(left, dtype=torch.float32)
        if size is not None and settings.sizes:
            log_size = size.log()
        log_size = log_size.masked_fill(~left, float("-inf"))
        return Side(log_size, position, dropped, reduced)

    others = side(size)
    first = side(uniform) if cut is not None and settings.layer0 == "uniform" else others
    return first, others, positions


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
    start = _axes(positions, axes, B).gather(-1, first)  # [B, G, 1]
    if axes > 1 and distance and bool((start[:, 0, 0] != old.sum(1)).any()):
        raise NotImplementedError(
            "past_key_values holds an image that was not reduced, and the positions of its tokens "
            "are unknown; use calibrate='size', or keep fewer tokens of that image too"
        )
    to_the_end = old.flip(1).cumsum(1).flip(1)
    log_size = torch.zeros(B, count, device=valid.device).masked_fill(~old, float("-inf"))
    nothing = torch.zeros(B, dtype=torch.int64, device=valid.device)
    return Side(log_size, (start - to_the_end[:, None]).int(), nothing, nothing.bool())


def _axes(positions: Tensor, axes: int, B: int) -> Tensor:
    """[B, G, S] from positions as models take them: [B or 1, S], or of rank 3 with one axis, those
    of M-RoPE, or those and the text's before them."""
    given = positions[-axes:] if positions.dim() == 3 else positions[None]
    return given.expand(axes, B, -1).transpose(0, 1)
