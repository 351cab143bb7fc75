"""LLaVA-1.5: every picture has as many tokens, each at a position of its own."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.vision import (
    get_num_selected_vision_tokens,
    get_vision_encoder_info,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from restore_ext.hf.tower_scores import cls_attention, received_attention, received_from_all
from restore_ext.hf.vision import Seen
from restore_ext.integrations.vllm.cpu import let_runner_ask
from restore_ext.integrations.vllm.model import Processor, Reduced, Watch, raster
from restore_ext.integrations.vllm.rows import Item
from restore_ext.methods.problem import CLS, KEYS, TOWER_FEATURES


def tokens_of_picture(config: Any) -> int:
    tower = get_vision_encoder_info(config)
    side = tower.get_image_size()
    patches = tower.get_num_image_tokens(image_width=side, image_height=side)
    return get_num_selected_vision_tokens(patches, config.vision_feature_select_strategy)


class LlavaProcessor(Processor, LlavaMultiModalProcessor):
    axes = 1

    def span(self, image: Any, tokens: int) -> int:
        if self.settings.positions == "reindex":
            return tokens
        return tokens_of_picture(self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class RestoreLlava(
    Reduced, LlavaForConditionalGeneration, SupportsMRoPE, SupportsMultiModalPruning
):
    """Scores are those of attach(): the CLS token's attention, or the attention received, in the
    layer that the features are taken from, the deepest if there are several."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.install(vllm_config, axes=1)
        let_runner_ask()
        self.per_image = tokens_of_picture(self.config)
        self.watch: Watch | None = None
        self.tower: list[Tensor] = []  # what went into the projector
        if self.settings.needs_scores:
            # vLLM builds no layer behind the one that the features are taken from.
            self.watch = Watch(self.vision_tower.vision_model.encoder.layers[-1].self_attn.attn)
        if self.settings.chosen.metric == TOWER_FEATURES:
            self.multi_modal_projector.register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: tuple[Any, ...]) -> None:
        self.tower = list(args[0])

    def _process_image_input(self, image_input: Any) -> tuple[Tensor, ...]:
        features = list(super()._process_image_input(image_input))
        seen = Seen(len(features))
        if self.watch is not None:
            query, key = self.watch.take()
            scores = self._score(query, key)
            seen.scores = list(scores)
            if self.settings.chosen.metric == KEYS:
                seen.metric = list(key.mean(1)[:, -scores.shape[1] :])
        if self.settings.chosen.metric == TOWER_FEATURES:
            seen.metric, self.tower = self.tower, []
        places = raster(self.per_image, features[0].device)
        return self.reduced(features, seen, [places] * len(features))

    def _score(self, query: Tensor, key: Tensor) -> Tensor:
        assert self.watch is not None
        score = cls_attention if self.settings.chosen.scores == CLS else received_from_all
        if self.config.vision_feature_select_strategy != "default":
            score = received_attention
        return score(query, key, self.watch.attention.scale)

    def items(self, images: Sequence[Any]) -> list[Item]:
        places = [image.mm_position for image in images]
        if self.settings.positions == "reindex":
            return [Item(place.offset, place.length, place.length) for place in places]
        return [Item(place.offset, place.length, self.per_image) for place in places]

    def is_image(self, ids: Tensor) -> Tensor:
        return ids == self.config.image_token_index
