"""What a few rows of attention say of the tokens: asked for beforehand, seen as a layer runs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restore_ext import ops, profiling, reference

_ROWS = 256  # at a time, where there is no operator


@dataclass(frozen=True)
class Asked:
    """Who rates: the last `rows` tokens of the prompt, which has `draft` more behind it."""

    rows: int
    draft: int
    weight: Tensor | None = None  # [B, R] float32; None: all the same

    @profiling.range("score_tokens")
    @torch.no_grad()
    def scores(
        self,
        query: Tensor,
        key: Tensor,
        arguments: dict[str, Any],
        kwargs: dict[str, Any],
        backend: str,
    ) -> Tensor:
        """[B, K] float32, what the rows attend to, averaged over heads.

        query [B, Hq, R, D] of the rows and key [B, Hkv, K, D] up to the last row's; what attention
        is told of them, the other keyword arguments of the attention call, and what attends
        """
        R, K = query.shape[2], key.shape[2]
        arguments = {**arguments, "weight": self.weight}
        if not arguments.pop("causal", True):
            arguments["key_range"] = arguments["key_range"].clamp(max=K)
        elif R > 1:
            own = torch.arange(K - R, K, dtype=torch.int32, device=query.device)
            ends = torch.stack([torch.zeros_like(own), own + 1], -1)
            arguments["key_range"] = ends.expand(len(query), R, 2)
        return row_scores(
            backend,
            query,
            key,
            softcap=kwargs.get("softcap") or 0.0,
            scale=kwargs.get("scaling"),
            **{n: x if x is None else x.to(query.device) for n, x in arguments.items()},
        )


def row_scores(
    backend: str, query: Tensor, key: Tensor, *, weight: Tensor | None = None, **arguments: Any
) -> Tensor:
    """By the operator, where attention is by one; else a few rows at a time, so that no attention
    matrix of all of them is there at once."""
    if backend == "op":
        return ops.row_scores(query, key, weight=weight, **arguments)
    B, _, R, _ = query.shape
    if weight is None:
        weight = torch.full((B, R), 1 / max(R, 1), device=query.device)
    total = torch.zeros(B, key.shape[2], device=query.device)
    for first in range(0, R, _ROWS):
        rows = slice(first, first + _ROWS)
        of_rows = {n: _of_rows(n, x, rows) for n, x in arguments.items()}
        some = query[:, :, rows].float()
        total += reference.row_scores(some, key.float(), weight=weight[:, rows], **of_rows)
    return total


def _of_rows(name: str, argument: Any, rows: slice) -> Any:
    """Of an argument of row_scores(), what belongs to some of the rows."""
    if argument is not None and name == "key_range":
        return argument[:, rows]
    return argument[..., rows] if argument is not None and name == "query_position" else argument


@torch.no_grad()
def rater_weights(
    embeds: Tensor, is_visual: Tensor, behind: Tensor, rows: int, draft: int
) -> Tensor:
    """What every one of the last `rows` tokens of a prompt counts for as a rater, [B, R] float32.

    SparseVLM, arXiv 2410.04417: text behind the last image whose share of the image's attention is
    above the average one's, P = softmax over that text of V T'; all of it where none is, and the
    last token where there is no such text.

    embeds [B, T, C], is_visual and behind [B, T] bool: the text behind the last image, of which a
    separator that ends the image is no part; `draft` tokens behind the prompt
    """
    T = embeds.shape[1]
    past = T - draft
    here = slice(past - rows, past)
    text = behind[:, here]
    only_last = torch.arange(rows, device=embeds.device) == rows - 1
    text = torch.where(text.any(1, keepdim=True), text, only_last)
    logit = embeds.float() @ embeds[:, here].float().mT  # [B, T, R]
    share = logit.masked_fill(~text[:, None, :], float("-inf")).softmax(-1)
    seen = share.masked_fill(~is_visual[..., None], 0).sum(1)
    seen = seen / is_visual.sum(1, keepdim=True).clamp(min=1)
    mean = seen.sum(1, keepdim=True) / text.sum(1, keepdim=True)
    rater = text & (seen > mean)
    rater = torch.where(rater.any(1, keepdim=True), rater, text).float()
    return rater / rater.sum(1, keepdim=True)
