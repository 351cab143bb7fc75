"""Where a model no longer looks at its pictures: the layer that VTW withdraws them at."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from restore_ext import checks
from restore_ext.hf.families import find_family
from restore_ext.hf.handle import attach, handle_of
from restore_ext.hf.visuals import kinds_of, pixels_of
from restore_ext.stages.stage import scaled_layer

DEFAULT_THRESHOLD = 0.003  # the paper's for LLaVA-1.5-7B; 0.0005 for 13B, 0.0001 for v1.6-7B
PUBLISHED_FIRST = 5


@torch.no_grad()
def find_withdrawal_layer(
    model: Any,
    prompts: Iterable[Mapping[str, Tensor]],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    first: int | None = None,
    backend: str = "op",
) -> int | None:
    """The first layer that can do without visual tokens (VTW, arXiv 2405.05803, algorithm 1).

    For every layer from `first` on, the tokens are withdrawn there, and the distribution of the
    word that follows each prompt is compared with that of the whole model: KL(withdrawn | whole),
    in nats, averaged over all rows of all prompts. The result is what `attach(model, method="vtw",
    options={"layer": ...})` takes. About 20 prompts will do.

    model      as for attach(), and not attached: it comes back as it was
    prompts    the inputs of forwards, as a processor returns them; left padded if in batches
    threshold  the mean divergence that is still none: 0.003 in the paper for LLaVA-1.5-7B, 0.0005
               for 13B, 0.0001 for LLaVA-1.6-7B
    first      the first layer to try, 1 or more; 5 by default, as in the paper, or where the model
               has fewer than 32 layers what corresponds to it
    backend    see attach

    returns  the first layer whose mean divergence is at most the threshold; None if there is none
    raises   TypeError, ValueError: as attach(), and for no prompts, or one without images.
             RuntimeError: attached already
    """
    family = find_family(model)
    depth = len(family.lm.layers)
    if first is None:
        first = min(PUBLISHED_FIRST, scaled_layer(PUBLISHED_FIRST, depth))
    if not 1 <= checks.require_int("first", first) < depth:
        raise ValueError(f"first must be in 1..{depth - 1}, got {first}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or threshold < 0:
        raise ValueError(f"threshold must be a number >= 0, got {threshold!r}")
    if handle_of(model) is not None:
        raise RuntimeError("model must not be attached: detach it first")
    given = [dict(prompt) for prompt in prompts]
    if not given:
        raise ValueError("prompts must be at least one, got none")
    for i, prompt in enumerate(given):
        if not kinds_of(family, prompt):
            raise ValueError(
                f"prompts[{i}] must have {pixels_of(family)}, or nothing is withdrawn; "
                f"got {sorted(prompt)}"
            )
    whole = [_next_word(model, prompt) for prompt in given]
    for layer in range(first, depth):
        with attach(model, method="vtw", options={"layer": layer}, backend=backend):
            apart = [
                _divergence(_next_word(model, prompt), full)
                for prompt, full in zip(given, whole, strict=True)
            ]
        if torch.cat(apart).mean() <= threshold:
            return layer
    return None


def _next_word(model: Any, prompt: Mapping[str, Any]) -> Tensor:
    """[B, V] float32 log-probabilities."""
    logits = model(**prompt, use_cache=False).logits[:, -1]
    return logits.float().log_softmax(-1)


def _divergence(withdrawn: Tensor, whole: Tensor) -> Tensor:
    """[B] KL(withdrawn | whole)."""
    return (withdrawn.exp() * (withdrawn - whole)).sum(-1)
