"""What a reduction needs to know of the images, seen while the vision tower runs as ever."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import ModelOutput

from restore_ext import profiling
from restore_ext.hf.attention import NamedConfig, stock_attention
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.tower_scores import Sight
from restore_ext.methods.problem import KEYS, TOWER_FEATURES
from restore_ext.reduction import Reduction

WATCHED = "restore_ext_watched"
IMAGE, VIDEO = "image", "video"  # kinds of features, as in get_image_features()
# Towers that look for "flash" in the name hand packed images over in one call, as for stock.
WATCHED_FLASH = "restore_ext_watched_flash"
_ATTRIBUTE = "restore_ext_seen"


@dataclass
class Seen:
    """Beside the features of a batch of images: importance, and what methods may compare, of those
    that are no separators. A frame of a video is an image, too."""

    images: int
    scores: list[Tensor] | None = None  # [N] float32 per image
    metric: list[Tensor] | None = None  # [N, Cm] per image; None: the features themselves
    visual: list[Tensor] | None = None  # [n] int64 per image, rising: its features but separators
    per_image: int | None = None  # features of an image, where several are in one tensor
    frames: list[list[int]] | None = None  # of every video the features of each frame
    reduced: tuple[Any, list[Reduction]] | None = None  # what came of it, and with which settings
    by_tower: bool = False  # the tower reduced them: there is nothing more to make of the features
    # With whom, in which order, and what came of it: see visuals.in_prompt_order().
    joined: "tuple[Seen, list[tuple[int, int]], Seen] | None" = None


@dataclass(frozen=True)
class Packing:
    """How a model made one list of features of each image's tiles, by pack_image_features()."""

    tiles: list[int]  # of each image
    tokens: int  # of a tile
    pack: Callable[..., tuple[list[Tensor], Any]]
    arguments: dict[str, Any]

    def __call__(self, rows: Tensor) -> list[Tensor]:
        """Packs what tiles [sum of tiles, tokens, C] have: [n, C] of each image, zeros where
        it put a newline."""
        newline = rows.new_zeros(rows.shape[-1])
        arguments = {**self.arguments, "image_newline": newline}
        return self.pack(rows.split(self.tiles), **arguments)[0]

    @functools.cached_property
    def visual(self) -> list[Tensor]:
        """The indices [n] int64, on the CPU, of each image's features that are no newlines."""
        marks = self(torch.ones(sum(self.tiles), self.tokens, 1))
        return [image[:, 0].nonzero()[:, 0] for image in marks]

    def without_newlines(self, rows: Tensor) -> list[Tensor]:
        """Packs, and leaves the newlines out."""
        pairs = zip(self(rows), self.visual, strict=True)
        return [image[index.to(image.device)] for image, index in pairs]


@dataclass
class Record:
    """What was seen while one get_image_features() or get_video_features() ran, for these
    settings."""

    settings: Settings
    kind: str = IMAGE  # or VIDEO
    attention: list[Tensor] = field(default_factory=list)  # [B, N] scores, call by call
    keys: list[Tensor] = field(default_factory=list)  # [B, N, D] of the scored tokens, likewise
    tower: Tensor | None = None  # the projector's input
    packing: Packing | None = None
    joined: Tensor | None = None  # [B, N] int64, the token each patch joined in the tower
    left: int = 0  # how many tokens those are
    merging: Any = None  # what tower_tome.py knows of the tokens on their way
    reduced: list[Reduction] = field(default_factory=list)  # of each image, by the tower


_RECORD: ContextVar[Record | None] = ContextVar("restore_ext_record", default=None)


@contextmanager
def recording(settings: Settings, kind: str) -> Iterator[Record]:
    record = Record(settings, kind)
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def is_recording() -> bool:
    """Whether this runs within a get_image_features() or get_video_features() that is watched."""
    return _RECORD.get() is not None


def recorded(settings: Settings) -> Record | None:
    """The record of a get_image_features() that runs for these settings, if one does."""
    record = _RECORD.get()
    return record if record is not None and record.settings is settings else None


def watch_attention(patches: Patches, module: nn.Module, score: Any) -> None:
    """Records score(query, key, scaling, sight) of every call of a vision attention module,
    whichever attention that calls."""
    watching = NamedConfig(module.config, WATCHED, score)
    if "flash" in watching.stock._attn_implementation:
        watching._attn_implementation = WATCHED_FLASH
    patches.set(module, "config", watching)


def watch_projector(patches: Patches, projector: nn.Module) -> None:
    """Records the tower features that go into the projector, for a method that compares them."""

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        record = _RECORD.get()
        if record is not None and record.settings.chosen.metric == TOWER_FEATURES:
            record.tower = args[0].detach()

    patches.hook(projector, "forward_pre_hook", note)


def watch_packing(patches: Patches, inner: nn.Module) -> None:
    """Records how the tiles of images are packed."""
    original: Any = inner.pack_image_features
    signature = inspect.signature(original)

    @functools.wraps(original)
    def pack_image_features(image_features: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        if (record := _RECORD.get()) is not None:
            arguments = signature.bind(image_features, *args, **kwargs).arguments
            del arguments["image_features"]
            tiles = [len(image) for image in image_features]
            record.packing = Packing(tiles, image_features[0].shape[1], original, arguments)
        return original(image_features, *args, **kwargs)

    patches.set(inner, "pack_image_features", pack_image_features)


def watched(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """The registered attention of a watched module: stock, after a look at its queries and keys."""
    record = _RECORD.get()
    # What is recorded may be for prepare_inputs(), while attach() watches for a method of its own.
    if record is not None and record.settings.needs_scores:
        _require_all_heads(module, query)
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.no_grad(), profiling.range("score_patches"):
            sight = Sight.of(attention_mask, kwargs, key.shape[2])
            scores = module.config.state(query, key, scale, sight)
            record.attention.append(scores)
            if record.settings.chosen.metric == KEYS:
                record.keys.append(key.float().mean(1)[:, -scores.shape[1] :])
    return stock_attention(module, query, key, value, attention_mask, **kwargs)


def _require_all_heads(module: Any, query: Tensor) -> None:
    config = module.config
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    if query.shape[1] != heads:
        raise NotImplementedError(
            "model: the vision tower's attention must not be divided over ranks for a method that "
            f"reads it, got {query.shape[1]} of {heads} heads here; choose a method that needs no "
            "scores, or leave the tower out of tp_plan"
        )


def remember(output: Any, seen: Seen) -> None:
    """Ties `seen` to what get_image_features() returned. From 5.18 on generate() may encode long
    before the forward, and repeat the features for its beams, but hands on the same object."""
    if isinstance(output, ModelOutput):
        setattr(output, _ATTRIBUTE, seen)


def recall(output: Any) -> Seen | None:
    return getattr(output, _ATTRIBUTE, None)


AttentionInterface.register(WATCHED, watched)
AttentionInterface.register(WATCHED_FLASH, watched)
