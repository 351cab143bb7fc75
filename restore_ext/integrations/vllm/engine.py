"""What an engine has to be for its model to be reduced: looked at as it starts."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from restore_ext.integrations.vllm import PREFIX
from restore_ext.integrations.vllm.options import KEY, read_options
from restore_ext.integrations.vllm.rows import ROWS

# vLLM asks a model for its positions again where it prunes videos. At this rate it prunes none:
# 1 - RATE is 1.
RATE = 1e-300


class Asked(VerifyAndUpdateConfig):
    """The config of an engine whose model is reduced."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        model = vllm_config.model_config
        config, images = model.hf_config, model.multimodal_config
        settings = read_options(getattr(config, KEY, None), _axes(config))
        if getattr(config.vision_config, "model_type", None) == "pixtral":
            raise NotImplementedError("model: the vision tower must be CLIP or SigLIP, got Pixtral")
        _require(not images.enable_mm_embeds, "enable_mm_embeds off", "on")
        _require(not model.enable_prompt_embeds, "enable_prompt_embeds off", "on")
        _require(vllm_config.speculative_config is None, "no speculative decoding", "some")
        parallel = vllm_config.parallel_config
        _require(
            parallel.pipeline_parallel_size == 1,
            "pipeline_parallel_size 1",
            parallel.pipeline_parallel_size,
        )
        _require(
            parallel.tensor_parallel_size == 1 or not settings.needs_scores,
            f"tensor_parallel_size 1 for method {settings.method}, which reads the vision tower",
            parallel.tensor_parallel_size,
        )
        _require(
            not (vllm_config.compilation_config.compile_mm_encoder and settings.needs_scores),
            f"compile_mm_encoder off for method {settings.method}, which reads the vision tower",
            "on",
        )
        cache = vllm_config.cache_config.cache_dtype
        _require(
            not (settings.sizes and cache.startswith(("fp8", "int", "nvfp4", "turboquant"))),
            "a kv_cache_dtype of 16 bits or more for calibrate 'size'",
            cache,
        )
        _require(not images.video_pruning_rate, "no video_pruning_rate", images.video_pruning_rate)
        images.video_pruning_rate = RATE
        _widen(config)


class Forgotten(VerifyAndUpdateConfig):
    """The config of any other engine of the same models, which must not think it is reduced."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        if getattr(model_config.hf_config, KEY, None) is not None:
            ours = [PREFIX + name for name in model_config.architectures]
            raise ValueError(
                f"hf_overrides: with {KEY} must come architectures {ours}, got "
                f"{model_config.architectures}"
            )


def _axes(config: Any) -> int:
    text = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return 3 if "mrope_section" in text else 1


def _widen(config: Any) -> None:
    """As many rows for every token as we need: vLLM has one for each section of M-RoPE."""
    if _axes(config) == 1:
        config.rope_parameters = {"mrope_section": [0] * ROWS}
        return
    rope = config.get_text_config().rope_parameters
    rope["mrope_section"] = [*rope["mrope_section"][:3], *[0] * (ROWS - 3)]


def _require(holds: bool, wanted: str, got: Any) -> None:
    if not holds:
        raise NotImplementedError(f"{KEY} needs {wanted}, got {got}")
