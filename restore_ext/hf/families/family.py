"""What the hook asks of a family of models."""

import dataclasses
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from restore_ext import checks, profiling
from restore_ext.hf.attention import PREPARED, STATE, require_mask_attention
from restore_ext.hf.compat import image_features, layer_rotation, video_features
from restore_ext.hf.images import one_by_one
from restore_ext.hf.parallel import Heads, devices
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import IMAGE, VIDEO, Record, Seen
from restore_ext.methods.problem import PROJECTED, TOWER
from restore_ext.rope import rope_decay

if TYPE_CHECKING:
    from restore_ext.hf.cut import Cut


class Family(ABC):
    """A model: `inner` puts image features among the embeddings and calls `lm`, which has `layers`
    of `self_attn`."""

    name: ClassVar[str]
    model_class: ClassVar[str]
    axes: ClassVar[int]  # of a position: 1, or 3 for M-RoPE
    # Words of the table in docs/families.md:
    models: ClassVar[str]  # checkpoints of this class
    scores_from: ClassVar[str]  # the attention that methods with scores read
    videos: ClassVar[str] = ""  # how the model has them; none if there is nothing to say
    notes: ClassVar[str] = ""

    # Of the config, the placeholder of a video; None: the model has none, or frames as images.
    video_token_name: ClassVar[str | None] = None

    # Words of what watch_tower() refuses: why, and how pictures get smaller there instead.
    whole_tower: ClassVar[str] = ""
    smaller_pictures: ClassVar[str] = ""

    lm_name: ClassVar[str] = "language_model"  # of the inner model

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inner = model.model
        self.lm = getattr(model.model, self.lm_name)

    @property
    def attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.lm.layers]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the features that the model can put among the embeddings."""
        return (IMAGE,) if self.video_token_name is None else (IMAGE, VIDEO)

    def token(self, kind: str) -> int:
        """The placeholder of a feature."""
        name = "image_token_id" if kind == IMAGE else self.video_token_name
        assert name is not None
        return getattr(self.model.config, name)

    @property
    def kv_size(self) -> int:
        """Numbers in the key and value of one token in one layer."""
        return 2 * kv_heads(self.lm.config) * head_size(self.lm.config)

    @property
    def heads(self) -> Heads:
        """The query heads of a decoder layer."""
        return Heads.of(self.model, self.attentions[0], self.lm.config.num_attention_heads)

    @property
    def first_cut(self) -> int:
        """The first layer whose input may be cut."""
        return 1

    @property
    def windows(self) -> list[int | None]:
        """Per layer, how many positions back it sees, the query's own included; None: all."""
        config = self.lm.config
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(self.lm.layers)
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        """[B, L] int64: neighbours of one number see each other, forward too; -1 sees no further
        than itself. From the inner model's arguments; None where all is causal."""
        return None

    @property
    def window_cuts_blocks(self) -> bool:
        """Whether a sliding window holds within a block too."""
        return False

    def shorten(self, inputs: dict[str, Any], cut: "Cut") -> dict[str, Any]:
        """What else of the language model's arguments counts tokens, as it is after a cut."""
        return {}

    def placeholders(self, input_ids: Tensor | None, embeds: Tensor | None, kind: str) -> Tensor:
        """[B, S] bool: where features of this kind go. Separators around them are text."""
        if input_ids is not None:
            return input_ids == self.token(kind)
        assert embeds is not None
        token = torch.tensor(self.token(kind), device=embeds.device)
        return (embeds == self.inner.get_input_embeddings()(token)).all(-1)

    def fit(self, settings: Settings) -> Settings:
        """The settings as this model can have them: attention by a mask, and a warning that says
        why, where the op cannot serve it."""
        reason = self._why_no_op() if settings.backend == "op" else None
        if reason is None:
            return settings
        warnings.warn(f"backend='op' falls back to backend='mask': {reason}", stacklevel=3)
        return dataclasses.replace(settings, backend="mask")

    def _why_no_op(self) -> str | None:
        if self.lm.dtype not in checks.FLOATING:
            return f"the op needs float32, bfloat16 or float16, the model is in {self.lm.dtype}"
        size = head_size(self.lm.config)
        if size not in checks.OP_HEAD_SIZES:
            return f"the op needs a head size of 32 to 256 in steps of 8, got {size}"
        if any(hasattr(module, "sinks") for module in self.attentions):
            return "the op has no attention sinks"
        return next(filter(None, map(checks.why_no_kernels, devices(self.model))), None)

    def require(self, settings: Settings) -> None:
        """Raises for a model the hook cannot serve with these settings."""
        self.require_language_model(settings)
        trial = Patches()
        try:
            self.install(trial, settings)
        finally:
            trial.undo()

    def require_language_model(self, settings: Settings) -> None:
        """The part of require() that install() does not find out."""
        kinds = set(getattr(self.lm.config, "layer_types", None) or [])
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise NotImplementedError(
                "model: every layer of the language model must have full or sliding attention, got "
                f"layer_types {sorted(unknown)}"
            )
        if self.axes > 1 and any(self.windows):
            raise NotImplementedError(
                "model: with M-RoPE every layer of the language model must have full attention: a "
                f"sliding window counts tokens, not positions; got sliding_window {self.windows}"
            )
        if settings.stages:
            self._require_cuts(settings)
        if settings.backend == "mask":
            require_mask_attention(self.lm.config._attn_implementation)
        self.require_free()

    def _require_cuts(self, settings: Settings) -> None:
        first = min(stage.layer for stage in settings.stages)
        if first < self.first_cut:
            raise ValueError(
                f"method {settings.inside}: {self.name} can be cut from layer {self.first_cut} on, "
                f"got layer {first}"
            )

    def glance(self, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Has the attention of a decoder layer called on the layer's input [B, T, C], with the
        layer's keyword arguments and no mask and no cache."""
        device = next(layer.parameters()).device
        if device.type == "meta":  # accelerate brings the parameters to where the input is
            device = hidden.device
        rotation = layer_rotation(layer, kwargs)
        layer.self_attn(
            hidden_states=layer.input_layernorm(hidden.to(device)),
            position_embeddings=tuple(x.to(device) for x in rotation),
            attention_mask=None,
            **{STATE: kwargs[STATE]},
        )

    def require_prepared(self, settings: Settings) -> None:
        """Raises for a model that prepare_inputs() cannot serve and attach() can."""
        forwarded = inspect.signature(self.model.prepare_inputs_for_generation).parameters
        if "inputs_embeds" not in forwarded:
            raise NotImplementedError(
                f"model: generate() of a {type(self.model).__name__} takes no embeddings, which is "
                "what prepare_inputs() makes; use attach()"
            )
        if any(self.windows):
            raise NotImplementedError(
                "model: prepare_inputs() needs full attention in every layer, for generate() would "
                "count a sliding window in what is left of the prompt, got sliding_window "
                f"{self.windows}; use attach()"
            )
        if settings.distance:
            self._require_one_rope()

    def _require_one_rope(self) -> None:
        try:
            rope_decay(self.lm, 1)
        except ValueError as error:  # no layer was named, and they differ
            raise NotImplementedError(
                "model: prepare_inputs() has one distance term, which needs the same RoPE in every "
                f"layer, got a {type(self.lm).__name__} whose layers differ in theirs; use "
                "attach() or calibrate='size'"
            ) from error

    def require_free(self) -> None:
        """Raises inside a `with` block of prepare_inputs(), whose patches lie on top."""
        if any(module.config._attn_implementation == PREPARED for module in self.attentions):
            raise RuntimeError("model is in a `with` block of prepare_inputs(): leave that first")

    def install(self, patches: Patches, settings: Settings) -> None:
        """Puts on the model, in front of its language model, what the method needs."""
        if settings.chosen.place == PROJECTED:
            self.watch(patches, settings)
        else:
            self.watch_tower(patches, settings)

    @abstractmethod
    def watch(self, patches: Patches, settings: Settings) -> None:
        """Puts on the vision tower what fills a Record, as far as the method needs it."""

    def watch_tower(self, patches: Patches, settings: Settings) -> None:
        """The same for a method that acts on the picture or in the tower."""
        instead = self.smaller_pictures
        if settings.chosen.place == TOWER:
            instead = "use method tome, which merges behind the projector"
        raise NotImplementedError(
            f"method {settings.method} needs a token of every patch of a picture (llava, "
            f"paligemma), got {self.name}, {self.whole_tower}{instead and f'; {instead}'}"
        )

    @abstractmethod
    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        """What was read of each token, in the order of the features: record.attention, whose rows
        are numbers [B, N] or vectors [B, N, D], as [sum of tokens] or [sum of tokens, D].

        tokens of each image, or frame; inputs are those of what `record.kind` says: of
        get_image_features(), or of get_video_features()"""

    def metric(self, record: Record) -> Tensor:
        """The tower's features [sum of tokens, Cm] from a record."""
        assert record.tower is not None
        return record.tower.flatten(0, -2)

    def visual(self, record: Record) -> list[Tensor] | None:
        """Per image, the rising indices [n] int64, on any device, of its features that are no
        separators; None if none ever is."""
        return None

    def per_image(self, inputs: dict[str, Any]) -> int | None:
        """The features of an image, where get_image_features() returns them row by row."""
        return None

    def frames(self, inputs: dict[str, Any]) -> list[list[int]]:
        """Of every video the tokens of each frame: of a temporal group of patches, where several
        pictures are one. inputs are those of get_video_features()"""
        raise NotImplementedError(f"{self.name} has no videos of its own")

    @property
    def closing(self) -> Tensor | None:
        """[C], the separator that follows the last frame of a video; None if there is none."""
        return None

    @profiling.range("score_images")
    def see(self, record: Record, output: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], Seen]:
        """The features [N, C] of each image, or frame of a video, separators included, in what
        get_image_features(**inputs) or get_video_features(**inputs) returned, and what a record
        says of the others."""
        if record.kind == IMAGE:
            return self.images(record, output, inputs)
        frames, closing = self.frames(inputs), self.closing
        of_videos = video_features(output, list(map(sum, frames)), closing)
        seen = Seen(sum(map(len, frames)), frames=frames)
        if closing is not None:
            like = of_videos[0].device
            seen.visual = [torch.arange(n, device=like) for video in frames for n in video]
            for video in frames:
                video[-1] += 1
        pairs = zip(of_videos, frames, strict=True)
        features = [frame for video, sizes in pairs for frame in video.split(sizes)]
        self._read(seen, features, record, inputs)
        return features, seen

    def images(
        self, record: Record, output: Any, inputs: dict[str, Any]
    ) -> tuple[list[Tensor], Seen]:
        """see() for images."""
        features = image_features(output)
        seen = Seen(len(features), per_image=self.per_image(inputs))
        features = one_by_one(features, seen, lambda: [])
        seen.images = len(features)
        visual = self.visual(record)
        if visual is not None:
            seen.visual = [index.to(features[0].device) for index in visual]
        if record.reduced:
            seen.reduced, seen.by_tower = (record.settings, record.reduced), True
        self._read(seen, features, record, inputs)
        return features, seen

    def _read(
        self, seen: Seen, features: list[Tensor], record: Record, inputs: dict[str, Any]
    ) -> None:
        """Notes scores and what methods compare."""
        tokens = [len(image) for image in seen.visual or features]
        if record.attention:
            seen.scores = _split(self.scores(record, tokens, inputs), tokens)
        if record.keys:
            keys = dataclasses.replace(record, attention=record.keys)
            seen.metric = _split(self.scores(keys, tokens, inputs), tokens)
        if record.tower is not None:
            seen.metric = _split(self.metric(record), tokens)


def kv_heads(config: Any) -> int:
    """Heads of keys and values of a text config."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size(config: Any) -> int:
    """Numbers in a head of a text config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _split(rows: Tensor, tokens: Sequence[int]) -> list[Tensor]:
    if len(rows) != sum(tokens):
        raise NotImplementedError(
            f"the vision tower's tokens are not the images' features one by one: {len(rows)} "
            f"tokens, {sum(tokens)} features; choose a method that needs no scores"
        )
    return list(rows.split(list(tokens)))
