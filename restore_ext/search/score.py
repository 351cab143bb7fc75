"""How good the answers to one example are: what a search must not lose.

A score takes (model, inputs, label) and returns one number a row of the inputs, or one for a single
row; higher is better. It runs under no_grad, once for every example and schedule.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]
Score = Callable[[Any, Inputs, Any], float | Sequence[float]]


def first_token(model: Any, inputs: Inputs, label: int | Sequence[int]) -> list[float]:
    """1 where the likeliest token behind the prompt is the label, else 0.

    inputs  of B rows, left padded; label  B token ids, or one for one row
    """
    logits, wanted = _next(model, inputs, label)
    return (logits.argmax(-1) == wanted).float().tolist()


def log_likelihood(model: Any, inputs: Inputs, label: int | Sequence[int]) -> list[float]:
    """The log-probability of the label as the token behind the prompt, in nats. It moves where
    first_token() does not yet, so fewer examples do.

    inputs, label  as for first_token()
    """
    logits, wanted = _next(model, inputs, label)
    return logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()


def exact_match(processor: Any, max_new_tokens: int = 16) -> Score:
    """A score: 1 where the greedy answer is the label, whatever its case and spaces, else 0.

    Its labels are B texts, or one for one row.
    """

    def match(model: Any, inputs: Inputs, label: str | Sequence[str]) -> list[float]:
        given = dict(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        new = model.generate(**inputs, **given)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(new, skip_special_tokens=True)
        wanted = [label] if isinstance(label, str) else label
        return [float(_plain(a) == _plain(w)) for a, w in zip(answers, wanted, strict=True)]

    match.__name__ = f"exact_match(max_new_tokens={max_new_tokens})"
    return match


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _next(model: Any, inputs: Inputs, label: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """[B, V] float32 logits of the token behind the prompt, [B] the ids that are right."""
    logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
    wanted = torch.as_tensor(label, device=logits.device).reshape(-1)
    if len(wanted) != len(logits):
        raise ValueError(f"label must be {len(logits)} token ids, one a row, got {label!r}")
    return logits, wanted
