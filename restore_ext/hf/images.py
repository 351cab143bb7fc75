"""From the features of a batch of images to their reductions, once per image. A frame of a video is
an image."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from restore_ext import profiling
from restore_ext.checks import FLOATING, why_no_kernels
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import Seen
from restore_ext.methods.problem import PROJECTED
from restore_ext.reduce import reduce_tokens
from restore_ext.reduction import Reduction
from restore_ext.stages import Stage


def images_of_rows(counts: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
    """Which images are in each row, given its image tokens and those of each image in order.

    Counts decide, not runs: images may touch, and one may be cut up by separators.
    """
    rows: list[list[int]] = []
    image = 0
    for row, count in enumerate(counts):
        rows.append([])
        while count > 0 and image < len(tokens):
            rows[-1].append(image)
            count -= tokens[image]
            image += 1
        if count != 0:
            raise ValueError(
                f"input_ids: row {row} has {counts[row]} image tokens, which is no whole number of "
                f"images, or frames of a video, of {list(tokens)} tokens (in order, over all rows)"
            )
    if image != len(tokens):
        raise ValueError(f"input_ids has image tokens of {image} images, got {len(tokens)} images")
    return rows


def originals(rows: Sequence[Sequence[int]], copies: int) -> list[int]:
    """For each image, in order, its number before every row was repeated `copies` times (beams)."""
    numbers: list[int] = []
    first = 0
    for row, images in enumerate(rows):
        numbers += range(first, first + len(images))
        if row % copies == copies - 1:
            first += len(images)
    return numbers


def one_by_one(features: list[Tensor], seen: Seen, counts: Callable[[], list[int]]) -> list[Tensor]:
    """The features [N, C] image by image, frame by frame; counts() are the tokens of each row,
    asked for where the beams of a row repeat its videos."""
    if seen.per_image is not None:
        return [image for row in features if len(row) for image in row.split(seen.per_image)]
    if seen.frames is None:
        return features
    number = list(range(len(features)))
    if (copies := len(features) // len(seen.frames)) > 1:
        number = originals(images_of_rows(counts(), [len(video) for video in features]), copies)
    pairs = zip(number, features, strict=True)
    return [frame for video, rows in pairs for frame in rows.split(seen.frames[video])]


def without_separators(
    features: list[Tensor], seen: Seen, rows: Sequence[Sequence[int]], is_image: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The features [N, C] of each image, and where they go [B, S], less those that separate (the
    newlines of LLaVA-NeXT): to the plan they are text."""
    if seen.visual is None:
        return features, is_image
    number = originals(rows, len(features) // seen.images)
    visual = [seen.visual[image] for image in number]
    marks = [
        torch.zeros(len(image), dtype=torch.bool, device=image.device).index_fill(0, rest, True)
        for image, rest in zip(features, visual, strict=True)
    ]
    left = [image[rest] for image, rest in zip(features, visual, strict=True)]
    return left, is_image.masked_scatter(is_image, torch.cat(marks).to(is_image.device))


def merge_images(reductions: Sequence[Reduction], features: Tensor) -> Tensor:
    """Other features [sum of N, C] of the images' tokens by the same groups: [sum of n, C]."""
    merged = []
    for reduction, rows in zip(
        reductions, features.split([r.group.shape[1] for r in reductions]), strict=True
    ):
        batch = _stack([rows])
        fields = (getattr(reduction, field.name) for field in dataclasses.fields(reduction))
        there = Reduction(*(tensor.to(batch.device) for tensor in fields))
        merged.append(there.merge(batch)[0].to(rows))
    return torch.cat(merged)


@profiling.range("select_images")
def reduce_images(
    features: Sequence[Tensor],
    seen: Seen,
    rows: Sequence[Sequence[int]],
    settings: Settings,
    *,
    encoded_once: bool,
    refuse: Callable[[], None],
) -> list[Reduction] | None:
    """The reduction of every image of the batch (B = 1 each); None if every budget is met already,
    or the images are too few to be worth it.

    features      [N, C] of each image in the rows; the beams of a row repeat its images
    seen          of the `seen.images` that were encoded
    encoded_once  False: before 5.18 the beams' copies are encoded too
    refuse        called once it is known that there is something to reduce
    """
    number, first, asked = _encoded(features, seen, rows, settings, encoded_once)
    tokens, budgets = asked[0], settings.budgets(*asked)
    left = [min(budget, n) for budget, n in zip(budgets, tokens, strict=True)]
    spared = settings.spared(tokens, asked[2])
    stages = zip(settings.stages_for(*asked), tokens, spared, strict=True)
    if left == tokens and all(
        whole or stage.counts(n, n)[0] == n for own, n, whole in stages for stage in own
    ):
        return None
    refuse()
    if seen.reduced is not None and seen.reduced[0] is settings:
        known = seen.reduced[1]
        # What was encoded once may come again in other rows, which share other budgets.
        if seen.by_tower or [r.position.shape[1] for r in known] == left:
            return [known[image] for image in number]
    if seen.by_tower or (settings.chosen.place != PROJECTED and left != tokens):
        raise ValueError(
            f"method {settings.method!r} does not fit features that were encoded for another: "
            "encode the images with the model attached, by this method"
        )
    if settings.needs_scores and seen.scores is None:
        raise ValueError(
            f"method {settings.method!r} needs scores, which were not read: encode the images with "
            "the model attached, by this method"
        )
    reductions = reduce_each([features[i] for i in first], seen, settings, budgets)
    if not any(reduction.tokens.requires_grad for reduction in reductions):
        seen.reduced = settings, reductions
    return [reductions[image] for image in number]


def stages_of_images(
    features: Sequence[Tensor],
    seen: Seen,
    rows: Sequence[Sequence[int]],
    settings: Settings,
    encoded_once: bool,
) -> list[tuple[Stage, ...]]:
    """The cuts inside the language model of every image of the batch; arguments as above."""
    number, _, asked = _encoded(features, seen, rows, settings, encoded_once)
    stages = settings.stages_for(*asked)
    return [stages[image] for image in number]


def _encoded(
    features: Sequence[Tensor],
    seen: Seen,
    rows: Sequence[Sequence[int]],
    settings: Settings,
    encoded_once: bool,
) -> tuple[list[int], list[int], tuple[list[int], list[int], list[int]]]:
    """For every image which of those encoded it is, of each of these the first image that is it,
    and their tokens, owners and rows, see Settings.budgets."""
    number = originals(rows, len(features) // seen.images)
    first = [number.index(image) for image in range(seen.images)]
    owner = _keep_of_image(settings, seen.images, rows, encoded_once)
    row_of = [row for row, images in enumerate(rows) for _ in images]
    tokens = [len(features[image]) for image in first]
    return number, first, (tokens, owner, [row_of[image] for image in first])


def _keep_of_image(
    settings: Settings, images: int, rows: Sequence[Sequence[int]], encoded_once: bool
) -> list[int]:
    given = len(settings.keep) if isinstance(settings.keep, tuple) else images
    copies, rest = divmod(images, given)
    if rest == 0 and (copies == 1 or (not encoded_once and len(rows) % copies == 0)):
        return originals(rows, copies)
    raise ValueError(
        f"keep must be one int or one per image, {images} images, got {given}; a frame of a video "
        "is an image"
    )


def reduce_each(
    features: Sequence[Tensor], seen: Seen, settings: Settings, budgets: Sequence[int]
) -> list[Reduction]:
    """Neighbours of one size and budget are reduced together."""
    if settings.method is None or settings.chosen.place != PROJECTED:
        return [Reduction.untouched(x[None], x.new_ones(1, len(x)).float()) for x in features]
    reductions: list[Reduction] = []
    while len(reductions) < len(features):
        first = past = len(reductions)
        alike = len(features[first]), budgets[first]
        while past < len(features) and (len(features[past]), budgets[past]) == alike:
            past += 1
        batch = reduce_tokens(
            _stack(features[first:past]),
            keep=budgets[first],
            method=settings.method,
            metric=None if seen.metric is None else _stack(seen.metric[first:past]),
            scores=None if seen.scores is None else _stack(seen.scores[first:past]),
            restore=settings.restore,
            retain=settings.retain,
            anchor_mode=settings.anchor_mode,
            seed=settings.seed,
            **settings.options,
        )
        reductions += [one_image(batch, b, features[first]) for b in range(past - first)]
    return reductions


def _stack(images: Sequence[Tensor]) -> Tensor:
    return for_operators(torch.stack(list(images)))


def for_operators(batch: Tensor) -> Tensor:
    """As the operators have it: on the CPU, in float32, where they lack the device or the dtype."""
    batch = batch if why_no_kernels(batch.device) is None else batch.cpu()
    return batch if batch.dtype in FLOATING else batch.float()


def one_image(batch: Reduction, b: int, like: Tensor) -> Reduction:
    fields = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    one = Reduction(*(tensor[b : b + 1].to(like.device) for tensor in fields))
    return dataclasses.replace(one, tokens=one.tokens.to(like.dtype))
