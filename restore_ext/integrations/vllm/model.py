"""What the reduced models, and the processors in front of them, have in common."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from vllm.config import VllmConfig

from restore_ext.hf.images import reduce_each
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import Seen
from restore_ext.integrations.vllm.fold import fold, reach
from restore_ext.integrations.vllm.options import KEY, cache_key, read_options, tokens_left
from restore_ext.integrations.vllm.rows import (
    AXES,
    COLUMNS,
    DELTA,
    Item,
    fill_rows,
    prompt_rows,
    with_columns,
)


class Processor:
    """In front of a processor of vLLM: an image has as many tokens in the prompt as will be left of
    it, which its size alone decides, and cache entries of its own for every way to reduce it."""

    info: Any
    axes: ClassVar[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = read_options(getattr(self.info.get_hf_config(), KEY), self.axes)

    def span(self, image: Any, tokens: int) -> int:
        """How far positions go on behind an image that has so many tokens in the prompt."""
        raise NotImplementedError

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
        places = result["mm_placeholders"].get("image", [])
        images = result["mm_kwargs"].get("image", [None] * len(places))
        pairs = zip(images, places, strict=True)
        ahead = sum(self.span(image, place.length) - place.length for image, place in pairs)
        config = self.info.ctx.model_config
        if config.max_model_len + ahead > reach(config):
            raise ValueError(
                f"the prompt must have fewer images: with max_model_len {config.max_model_len} "
                f"positions can go to {reach(config)}, got {len(places)} images, behind which "
                f"positions are {ahead} ahead of the tokens"
            )
        return result

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> list[Any]:
        updates = super()._get_prompt_updates(*args, **kwargs)  # type: ignore[misc]
        return [self._shorter(u) if u.modality == "image" else u for u in updates]

    def _shorter(self, update: Any) -> Any:
        def replacement(item: int) -> list[int]:
            tokens = update.replacement(item)
            return tokens[: tokens_left(self.settings, len(tokens))]

        return replace(update, replacement=replacement)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        # Of the encoder's cache, the processor's and the prefix cache; even where a caller has
        # named an image, for what is no picture goes into the name.
        kwargs = {**inputs.hf_processor_mm_kwargs, KEY: cache_key(self.settings)}
        inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        return super()._get_mm_hashes(inputs)  # type: ignore[misc]


class Reduced:
    """In front of a model of vLLM, whose language model is folded and whose images are reduced."""

    supports_mrope: ClassVar[Literal[True]] = True
    supports_multimodal_pruning: ClassVar[Literal[True]] = True
    settings: Settings
    language_model: Any
    config: Any

    def install(self, config: VllmConfig, axes: int) -> None:
        """For a model that is built."""
        self.settings = read_options(getattr(self.config, KEY), axes)
        # Llama wants the tokens in front, Qwen2 behind, in what it is given as positions.
        self.by_token = axes == 1
        sizes, lm = self.settings.sizes, self.language_model.model
        fold(lm, config, sizes=sizes, by_token=self.by_token)

    def reduced(
        self, features: Sequence[Tensor], seen: Seen, places: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """What is left of each image [n, C], with what the prompt is to know of it behind.

        places  [N, AXES] int64 of the features [N, C] of each
        """
        budgets = [tokens_left(self.settings, len(image)) for image in features]
        reductions = reduce_each(features, seen, self.settings, budgets)
        left = []
        for reduction, place in zip(reductions, places, strict=True):
            source = reduction.position[0]
            if self.settings.positions == "reindex":
                source = torch.arange(len(source), device=source.device)
            left.append(with_columns(reduction.tokens[0], place[source], reduction.size[0]))
        return tuple(left)

    def items(self, images: Sequence[Any]) -> list[Item]:
        """The images of a prompt, as vLLM has them, in order."""
        raise NotImplementedError

    def is_image(self, ids: Tensor) -> Tensor:
        """[L] bool: where features go."""
        raise NotImplementedError

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        images = sorted(mm_features, key=lambda image: image.mm_position.offset)
        return prompt_rows(len(input_tokens), self.items(images))

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        delta = int(mrope_positions[DELTA, 0])
        if not multimodal_embeddings:
            return multimodal_embeddings, mrope_positions, delta
        device = mrope_positions.device
        columns = torch.cat([image[:, -COLUMNS:] for image in multimodal_embeddings]).to(device)
        is_image = self.is_image(torch.as_tensor(input_ids, device=device))
        rows = fill_rows(mrope_positions, is_image, columns, num_computed_tokens)
        return [image[:, :-COLUMNS] for image in multimodal_embeddings], rows, delta

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.by_token:
            positions = positions.T.contiguous()
        return super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )


class Watch:
    """The queries and keys of an attention of the vision tower, as it runs."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.calls: list[tuple[Tensor, Tensor]] = []  # [B, H, S, D] float32
        attention.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
        query, key = (
            x.view(*x.shape[:2], module.num_heads, -1).transpose(1, 2).float() for x in given[:2]
        )
        self.calls.append((query, key))

    def take(self) -> tuple[Tensor, Tensor]:
        """Of the one call since; they are forgotten here."""
        (call,) = self.calls
        self.calls.clear()
        return call


def raster(count: int, device: torch.device) -> Tensor:
    """Places [count, AXES] one behind the other."""
    return torch.arange(count, device=device)[:, None].expand(-1, AXES)
