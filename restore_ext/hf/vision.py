"""What a reduction needs to know of the images, seen while the vision tower runs as ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from restore_ext.hf.attention import MASK_NEEDS, NamedConfig, stock_attention
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.methods.problem import KEYS, TOWER_FEATURES
from restore_ext.reduction import Reduction

WATCHED = "restore_ext_watched"
_CHUNK = 256  # queries at a time: received attention never holds a whole N x N matrix
_ATTRIBUTE = "restore_ext_seen"


@dataclass
class Seen:
    """Beside the features of a batch of images: importance, and what methods may compare."""

    images: int
    scores: list[Tensor] | None = None  # [N] float32 per image
    metric: list[Tensor] | None = None  # [N, Cm] per image; None: the features themselves
    reduced: tuple[Any, list[Reduction]] | None = None  # what came of it, and with which settings
    by_tower: bool = False  # the tower reduced them: there is nothing more to make of the features


@dataclass
class Record:
    """What was seen while one get_image_features() ran, for these settings."""

    settings: Settings
    attention: list[Tensor] = field(default_factory=list)  # [B, N] scores, call by call
    keys: list[Tensor] = field(default_factory=list)  # [B, N, D] of the scored tokens, likewise
    tower: Tensor | None = None  # the projector's input
    joined: Tensor | None = None  # [B, N] int64, the token each patch joined in the tower
    left: int = 0  # how many tokens those are
    merging: Any = None  # what tower_tome.py knows of the tokens on their way
    reduced: list[Reduction] = field(default_factory=list)  # of each image, by the tower


_RECORD: ContextVar[Record | None] = ContextVar("restore_ext_record", default=None)


@contextmanager
def recording(settings: Settings) -> Iterator[Record]:
    record = Record(settings)
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def recorded(settings: Settings) -> Record | None:
    """The record of a get_image_features() that runs for these settings, if one does."""
    record = _RECORD.get()
    return record if record is not None and record.settings is settings else None


def watch_attention(patches: Patches, module: nn.Module, score: Any) -> None:
    """Records score(query, key, scaling) of every call of a vision attention module."""
    rename_attention(patches, module, WATCHED, score)


def rename_attention(patches: Patches, module: nn.Module, name: str, state: Any) -> None:
    """Has a vision attention module call the attention registered as `name`, which finds `state` in
    the module's config."""
    renamed = NamedConfig(module.config, name, state)
    stock = renamed.stock._attn_implementation
    if stock not in MASK_NEEDS:
        raise ValueError(
            f"the method needs the vision tower's attention, which must be "
            f"{' or '.join(MASK_NEEDS)}, got {stock!r}; call "
            "model.set_attn_implementation({'vision_config': 'sdpa'}) first"
        )
    patches.set(module, "config", renamed)


def watch_projector(patches: Patches, projector: nn.Module) -> None:
    """Records the tower features that go into the projector, for a method that compares them."""

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        record = _RECORD.get()
        if record is not None and record.settings.chosen.metric == TOWER_FEATURES:
            record.tower = args[0].detach()

    patches.hook(projector, "forward_pre_hook", note)


def watched(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The registered attention of a watched module: stock, after a look at its queries and keys."""
    record = _RECORD.get()
    # What is recorded may be for prepare_inputs(), while attach() watches for a method of its own.
    if record is not None and record.settings.needs_scores:
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.no_grad():
            scores = module.config.state(query.float(), key.float(), scale)
            record.attention.append(scores)
            if record.settings.chosen.metric == KEYS:
                record.keys.append(key.float().mean(1)[:, -scores.shape[1] :])
    return stock_attention(module, query, key, value, attention_mask, **kwargs)


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The CLS token's attention to the others, averaged over heads: [B, H, N+1, D] to [B, N]."""
    share = (query[:, :, :1] @ key.mT * scale).softmax(-1)
    return share[:, :, 0, 1:].mean(1)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """What every token gets, averaged over heads and queries: [B, H, N, D] to [B, N]."""
    total = query.new_zeros(key.shape[:3])
    for some in query.split(_CHUNK, dim=2):
        total += (some @ key.mT * scale).softmax(-1).sum(2)
    return total.mean(1) / query.shape[2]


def received_from_all(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """What every token but the CLS token gets, its attention among them: [B, H, N+1, D] to
    [B, N]."""
    return received_attention(query, key, scale)[:, 1:]


def remember(features: list[Tensor], seen: Seen) -> None:
    """Ties `seen` to the features. generate() may encode long before the forward and repeat the
    list for its beams, but hands on the same tensors."""
    if features:
        setattr(features[0], _ATTRIBUTE, seen)


def recall(features: list[Tensor]) -> Seen | None:
    return getattr(features[0], _ATTRIBUTE, None) if features else None


AttentionInterface.register(WATCHED, watched)
