"""What a diagnosis found: curves, distances, similarities, and all of it in one dict."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from restore_ext.hf.diagnosis.layout import ImageTokens
from restore_ext.hf.diagnosis.probe import MAPPED, QUERIES
from restore_ext.reduction import Reduction

COMPARED = ("visual", "text")  # the queries whose curves make the one distance


@dataclass(frozen=True)
class Run:
    """One way of running the model on B prompts, of I images in all, through L layers.

    On the CPU. Queries are "visual": all visual tokens that a layer has, each counting once;
    "text": the text behind the last image of the prompt; "last": the prompt's last token.
    """

    tokens: Tensor  # [B, L] int64, visual tokens in each layer
    share: dict[str, Tensor]  # of each kind of query, [B, L] float64: the share of its attention
    # (mean over heads and queries) on visual tokens; NaN in a layer that has no such query
    attention: dict[str, list[Tensor]]  # of "text" and "last", per image [L, N] float32: what each
    # of its tokens gets; what a merged one gets is in equal parts its members'


@dataclass(frozen=True)
class Way(Run):
    """A reduced run, beside the full one."""

    reductions: list[Reduction]  # of each image, B = 1, cuts included; its tokens are of no channel
    cosine: dict[str, Tensor]  # [B] float64: of states behind the last norm to those of the full
    # run; "last" token, and the mean over "visual", "kept" and "merged" tokens, NaN where none is
    divergence: Tensor  # [B, n] float64, KL(full | reduced) of the next token in nats; NaN behind
    # the end of an answer
    agreement: Tensor  # [B, n] float64, 1 where both find the same token likeliest; NaN likewise


@dataclass(frozen=True)
class Diagnosis:
    """What diagnose() found."""

    full: Run
    ways: dict[str, Way]  # "reindexed", "original", "restore", as far as they can be had
    left_out: dict[str, str]  # of the others, why
    images: list[ImageTokens]
    answer: Tensor  # [B, n] int64, the full run's greedy tokens, which all ways were made to say
    options: dict[str, Any]  # what was asked for

    def distance_per_layer(self, way: str) -> dict[str, Tensor]:
        """[B, L] for each kind of query: |share - share of the full run|, NaN where there is no
        such query."""
        share = self.ways[way].share
        return {name: (share[name] - self.full.share[name]).abs() for name in QUERIES}

    def distance(self, way: str) -> dict[str, Tensor]:
        """[B] float64: the distance of a way's curves to those of the full run.

        For each kind of query the mean over layers (that have such a query) of the difference of
        shares; "overall" is the mean of those of "visual" and "text", the one number. In 0..1.
        """
        apart = {name: x.nanmean(1) for name, x in self.distance_per_layer(way).items()}
        overall = torch.stack([apart[name] for name in COMPARED]).nanmean(0)
        return {"overall": overall, **apart}

    def summary(self) -> dict[str, Any]:
        """All numbers, ready for JSON: curves are means over the prompts, None stands for NaN, and
        what is compared is {"mean", "half_width"}, the latter of a 95 % interval (normal) over the
        prompts, None for a single one."""
        return {
            "options": self.options,
            "prompts": len(self.answer),
            "layers": self.full.tokens.shape[1],
            "full": _curves(self.full),
            "ways": {name: self._of_way(name) for name in self.ways},
            "left_out": self.left_out,
        }

    def _of_way(self, name: str) -> dict[str, Any]:
        way = self.ways[name]
        per_layer = self.distance_per_layer(name).items()
        return {
            **_curves(way),
            "distance": {kind: estimate(x) for kind, x in self.distance(name).items()},
            "distance_per_layer": {kind: _list(x.nanmean(0)) for kind, x in per_layer},
            "cosine": {kind: estimate(x) for kind, x in way.cosine.items()},
            "kl": _output(way.divergence),
            "top1": _output(way.agreement),
        }


def join(parts: Sequence[Diagnosis]) -> Diagnosis:
    """Diagnoses of several batches, of one model by the same options, as one of all prompts."""
    n = max(part.answer.shape[1] for part in parts)
    images, first = [], 0
    for part in parts:
        images += [ImageTokens(image.row + first, image.index) for image in part.images]
        first += len(part.answer)
    ways = {}
    for name in parts[0].ways:
        some = [part.ways[name] for part in parts]
        ways[name] = Way(
            **_joined(some),
            reductions=[reduction for way in some for reduction in way.reductions],
            cosine={k: torch.cat([way.cosine[k] for way in some]) for k in some[0].cosine},
            divergence=torch.cat([_padded(way.divergence, n, torch.nan) for way in some]),
            agreement=torch.cat([_padded(way.agreement, n, torch.nan) for way in some]),
        )
    return Diagnosis(
        Run(**_joined([part.full for part in parts])),
        ways,
        parts[0].left_out,
        images,
        torch.cat([_padded(part.answer, n, 0) for part in parts]),
        parts[0].options,
    )


def estimate(values: Tensor) -> dict[str, float | None]:
    """Of numbers [B], NaN left out: the mean, and the half-width of its 95 % interval (normal)."""
    known = values[~values.isnan()]
    if len(known) < 2:
        return {"mean": float(known[0]) if len(known) else None, "half_width": None}
    half_width = 1.96 * float(known.std()) / sqrt(len(known))
    return {"mean": float(known.mean()), "half_width": half_width}


def _joined(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "tokens": torch.cat([run.tokens for run in runs]),
        "share": {name: torch.cat([run.share[name] for run in runs]) for name in QUERIES},
        "attention": {name: [x for run in runs for x in run.attention[name]] for name in MAPPED},
    }


def _padded(x: Tensor, n: int, value: float) -> Tensor:
    return pad(x, (0, n - x.shape[1]), value=value)


def _curves(run: Run) -> dict[str, Any]:
    share = {name: _list(x.nanmean(0)) for name, x in run.share.items()}
    return {"visual_tokens": _list(run.tokens.double().mean(0)), "share": share}


def _output(per_token: Tensor) -> dict[str, Any]:
    """Of the token that follows the prompt, and of the whole answer."""
    return {"first": estimate(per_token[:, 0]), "answer": estimate(per_token.nanmean(1))}


def _list(values: Tensor) -> list[float | None]:
    return [None if isnan(x) else x for x in values.tolist()]
