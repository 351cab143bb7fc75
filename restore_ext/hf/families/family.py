"""What the hook asks of a family of models."""

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from restore_ext import checks, profiling
from restore_ext.hf.attention import PREPARED, require_mask_attention
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import Record, Seen
from restore_ext.methods.problem import PROJECTED
from restore_ext.rope import rope_decay

OP_HEAD_SIZES = range(32, 257, 8)


class Family(ABC):
    """A model: `inner` puts image features among the embeddings and calls `lm`, which has `layers`
    of `self_attn`."""

    name: ClassVar[str]
    model_class: ClassVar[str]
    axes: ClassVar[int]  # of a position: 1, or 3 for M-RoPE

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inner = model.model
        self.lm = model.model.language_model

    @property
    def attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.lm.layers]

    @property
    def image_token(self) -> int:
        return self.model.config.image_token_id

    @property
    def kv_size(self) -> int:
        """Numbers in the key and value of one token in one layer."""
        return 2 * self._kv_heads * self._head_size

    @property
    def _kv_heads(self) -> int:
        config = self.lm.config
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    @property
    def _head_size(self) -> int:
        config = self.lm.config
        head_size = getattr(config, "head_dim", None)
        return head_size or config.hidden_size // config.num_attention_heads

    def placeholders(self, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """[B, S] bool: where image features go. Separators around them are text."""
        if input_ids is not None:
            return input_ids == self.image_token
        assert embeds is not None
        token = torch.tensor(self.image_token, device=embeds.device)
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
        if self._head_size not in OP_HEAD_SIZES:
            return f"the op needs a head size of 32 to 256 in steps of 8, got {self._head_size}"
        devices = dict.fromkeys(parameter.device for parameter in self.model.parameters())
        return next(filter(None, map(checks.why_no_kernels, devices)), None)

    def require(self, settings: Settings) -> None:
        """Raises for a model the hook cannot serve with these settings."""
        config = self.lm.config
        kinds = getattr(config, "layer_types", None) or []
        windowed = getattr(config, "sliding_window", None) is not None
        windowed = windowed and getattr(config, "use_sliding_window", True)
        if any(kind != "full_attention" for kind in kinds) or (windowed and not kinds):
            raise NotImplementedError(
                "model: the language model must have full attention in every layer, got "
                f"layer_types {sorted(set(kinds)) or 'sliding_attention'} (sliding_window "
                f"{getattr(config, 'sliding_window', None)})"
            )
        if settings.distance:
            try:
                rope_decay(self.lm, 1)
            except ValueError as error:  # no layer was named, and they differ
                raise NotImplementedError(
                    "model: the distance term needs the same RoPE in every layer, got a "
                    f"{type(self.lm).__name__} whose layers differ in theirs; use calibrate='size'"
                ) from error
        if settings.backend == "mask":
            require_mask_attention(config._attn_implementation)
        self.require_free()
        trial = Patches()
        try:
            self.install(trial, settings)
        finally:
            trial.undo()

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
        raise NotImplementedError(
            f"method {settings.method} needs a vision tower of a fixed grid of patches (llava), "
            f"got {self.name}; make its pictures smaller in the processor"
        )

    @abstractmethod
    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        """What was read of each token, in the order of the features: record.attention, whose rows
        are numbers [B, N] or vectors [B, N, D], as [sum of tokens] or [sum of tokens, D].

        tokens of each image; inputs are those of get_image_features()"""

    @profiling.range("score_images")
    def seen(self, record: Record, features: Sequence[Tensor], inputs: dict[str, Any]) -> Seen:
        """What a record says of the features that get_image_features(**inputs) returned."""
        tokens = [len(image) for image in features]
        seen = Seen(len(tokens))
        if record.reduced:
            seen.reduced, seen.by_tower = (record.settings, record.reduced), True
        if record.attention:
            seen.scores = _split(self.scores(record, tokens, inputs), tokens)
        if record.keys:
            keys = dataclasses.replace(record, attention=record.keys)
            seen.metric = _split(self.scores(keys, tokens, inputs), tokens)
        if record.tower is not None:
            seen.metric = _split(record.tower.flatten(0, -2), tokens)
        return seen


def _split(rows: Tensor, tokens: Sequence[int]) -> list[Tensor]:
    if len(rows) != sum(tokens):
        raise NotImplementedError(
            f"the vision tower's tokens are not the images' features one by one: {len(rows)} "
            f"tokens, {sum(tokens)} features; choose a method that needs no scores"
        )
    return list(rows.split(list(tokens)))
