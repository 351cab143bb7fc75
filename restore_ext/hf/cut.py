"""A batch of sequences cut down: what goes into the language model, and the cuts inside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restore_ext.hf.cache import RestoreLayer
from restore_ext.hf.families import Family
from restore_ext.hf.images import (
    images_of_rows,
    reduce_images,
    stages_of_images,
    without_separators,
)
from restore_ext.hf.plan import SequencePlan, plan_sequence
from restore_ext.hf.report import ImageReport, LayerReport, Report
from restore_ext.hf.scores import Asked, rater_weights
from restore_ext.hf.settings import Settings
from restore_ext.hf.step import PlannedStage, plan_stages
from restore_ext.hf.visuals import Visuals
from restore_ext.reduction import Reduction


@dataclass(frozen=True)
class Cut:
    plan: SequencePlan
    rows: list[list[int]]  # the images of each row
    reductions: list[Reduction]  # of each image
    tokens: Tensor  # [sum of n, C], the images' reduced tokens
    starts: list[int]  # of each image, the column of its first token
    is_image: Tensor  # [B, S] bool
    is_frame: list[bool]  # whether each image is a frame of a video
    stages: list[PlannedStage]  # the cuts to come, inside the language model
    reach: int  # one more than the highest position
    past_image: Tensor  # [B] int64, one more than the index of the last image token; 0: no image
    behind: int  # tokens behind the last image, in every row
    text: int  # tokens behind the last image, in the row that has the most of them

    def report(
        self, family: Family, dtype: torch.dtype, layers: Sequence[RestoreLayer], logical: int
    ) -> Report:
        """layers: of the cache, before this sequence, whose logical length is given too."""
        B, S = self.plan.assign.shape
        before, new = logical + S, self.plan.source.shape[1]
        per_token = B * family.kv_size * dtype.itemsize
        images = self._images()
        visual = [image.tokens_after for image in images]
        cuts = {planned.stage.layer: planned for planned in self.stages}
        reports = []
        for index in range(len(family.lm.layers)):
            if index in cuts:
                new, visual = cuts[index].length, cuts[index].after
            after = new + (layers[index].physical if layers else 0)
            reports.append(LayerReport(before, after, after * per_token, visual))
        return Report(
            images=images,
            layers=reports,
            plan=self.plan,
            kv_bytes=sum(report.kv_bytes for report in reports),
            # Stock drops what a window of w tokens no longer needs: all but the last w - 1.
            kv_bytes_stock=per_token
            * sum(min(before, (w or before + 1) - 1) for w in family.windows),
        )

    def askers(self, embeds: Tensor, draft: int) -> dict[str, Asked]:
        """Who rates, for the scores that the stages want; embeddings [B, T, C] as they go in."""
        asked = {"attention": Asked(1, draft), "lookahead": Asked(1, draft)}
        if any(planned.stage.scores == "raters" for planned in self.stages):
            rows = min(max(self.text - draft, 1), embeds.shape[1] - draft)
            text = self.plan.valid & (self.plan.source >= self.past_image[:, None])
            weight = rater_weights(embeds, self.plan.is_visual, text, rows, draft)
            asked["raters"] = Asked(rows, draft, weight)
        return asked

    def _images(self) -> list[ImageReport]:
        sizes = [reduction.group.shape[1] for reduction in self.reductions]
        reports = []
        for row, images in enumerate(self.rows):
            for image in images:
                reduction = self.reductions[image]
                after, is_frame = reduction.position.shape[1], self.is_frame[image]
                start, before = self.starts[image], sizes[image]
                reports.append(ImageReport(row, start, before, after, reduction, is_frame))
        return reports


def cut_sequence(
    visuals: Visuals,
    settings: Settings,
    *,
    valid: Tensor,
    positions: Tensor,
    encoded_once: bool,
    refuse: Callable[[], None],
) -> Cut | None:
    """Reduces the images of a batch; None if all are within their budgets.

    valid [B, S] bool; positions [..., B or 1, S]
    refuse  called before any reduction is made: raises where a shorter sequence cannot be had
    """
    features, seen, is_image = visuals.features, visuals.seen, visuals.at
    (B, S), device = is_image.shape, is_image.device
    past_image = torch.where(is_image, torch.arange(1, S + 1, device=device), 0).amax(1)
    per_row = [is_image.sum(1), valid.sum(1), past_image, positions.amax().expand(B)]
    sizes = [len(image) for image in features]
    columns = torch.nonzero_static(is_image, size=sum(sizes))[:, 1].split(sizes)
    asked = torch.cat([torch.stack(per_row).flatten(), *(image[:1] for image in columns)])
    told = asked.tolist()  # the one wait for the device
    counts = [told[i * B : (i + 1) * B] for i in range(len(per_row))]
    rows = images_of_rows(counts[0], sizes)
    features, is_image = without_separators(features, seen, rows, is_image)
    reductions = reduce_images(
        features, seen, rows, settings, encoded_once=encoded_once, refuse=refuse
    )
    if reductions is None:
        return None
    before = [reduction.group.shape[1] for reduction in reductions]
    left = [reduction.position.shape[1] for reduction in reductions]
    gone = [n - m for n, m in zip(before, left, strict=True)]
    dropped = [sum(gone[image] for image in images) for images in rows]
    lengths = [n - d for n, d in zip(counts[1], dropped, strict=True)]
    row_of = [row for row, images in enumerate(rows) for _ in images]
    with_image = [past for past, images in zip(counts[2], rows, strict=True) if images]
    stages = stages_of_images(features, seen, rows, settings, encoded_once)
    tokens = torch.cat([reduction.tokens[0] for reduction in reductions])
    return Cut(
        plan_sequence(is_image, valid, reductions, lengths),
        rows,
        reductions,
        tokens,
        told[len(per_row) * B :],
        is_image,
        visuals.is_frame,
        plan_stages(stages, left, settings.spared(before, row_of), rows, lengths, device),
        reach=int(counts[3][0]) + 1,
        past_image=past_image,
        behind=S - max(counts[2]),
        text=S - min(with_image),
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
