"""The vLLM plug-in: LLaVA-1.5 and Qwen2.5-VL with a fixed budget of visual tokens (docs/vllm.md).

vLLM finds register() by the entry point `vllm.general_plugins`. A model is reduced where its
engine was asked to, by --hf-overrides; any other is what it is without the plug-in.
"""

import logging

LOGGER = logging.getLogger("restore_ext.integrations")

# The class of vLLM that a config names, and ours in its place.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava:RestoreLlava",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:RestoreQwen2_5_VL",
}
PREFIX = "Restore"  # ours is asked for by theirs with this in front


def register() -> None:
    """Makes the architectures known to vLLM, in every process of an engine; twice is once.

    vLLM calls this wherever the package is installed, asked for or not, and an error here would end
    any engine: another version's is left alone with a warning.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from restore_ext.integrations.vllm.engine import Asked, Forgotten
    except ImportError as error:
        LOGGER.warning("the plug-in is for vLLM 0.32 and leaves this one alone: %s", error)
        return

    for stock, ours in ARCHITECTURES.items():
        ModelRegistry.register_model(PREFIX + stock, f"{__name__}.{ours}")
        MODELS_CONFIG_MAP[PREFIX + stock] = Asked
        MODELS_CONFIG_MAP.setdefault(stock, Forgotten)
