"""The model families that can be hooked: one a file, each no more than what is its own."""

from typing import Any

from restore_ext.hf.families.aya_vision import AyaVision
from restore_ext.hf.families.family import Family
from restore_ext.hf.families.gemma3 import Gemma3
from restore_ext.hf.families.glm4v import Glm4v
from restore_ext.hf.families.idefics3 import Idefics3
from restore_ext.hf.families.internvl import InternVL
from restore_ext.hf.families.llava import Llava
from restore_ext.hf.families.llava_next import LlavaNext
from restore_ext.hf.families.llava_onevision import LlavaOnevision
from restore_ext.hf.families.mistral3 import Mistral3
from restore_ext.hf.families.paligemma import PaliGemma
from restore_ext.hf.families.qwen2_5_vl import Qwen2_5_VL
from restore_ext.hf.families.qwen2_vl import Qwen2VL
from restore_ext.hf.families.qwen3_vl import Qwen3VL
from restore_ext.hf.families.smolvlm import SmolVLM

__all__ = ["FAMILIES", "REFUSED", "Family", "find_family", "list_families"]

FAMILIES: tuple[type[Family], ...] = (
    Llava,
    LlavaNext,
    LlavaOnevision,
    InternVL,
    Mistral3,
    Idefics3,
    SmolVLM,
    AyaVision,
    Qwen2VL,
    Qwen2_5_VL,
    Qwen3VL,
    Glm4v,
    PaliGemma,
    Gemma3,
)

# Classes that cannot be hooked, and why.
REFUSED = {
    "Llama4ForConditionalGeneration": "its RoPE is a table of complex numbers, left out in some "
    "layers, and its attention is cut into chunks of the original positions",
    "MllamaForConditionalGeneration": "its image tokens are no part of the sequence: layers of "
    "cross-attention read them, which have neither positions nor a growing cache",
}


def list_families() -> list[str]:
    """The names of the families of models that attach() and prepare_inputs() know."""
    return [family.name for family in FAMILIES]


def find_family(model: Any) -> Family:
    """The family of a model.

    raises  NotImplementedError: a class that is known and cannot be hooked, with the reason
            TypeError: any other class without a family, listing those that have one
    """
    classes = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if family.model_class in classes:
            return family(model)
    for name, reason in REFUSED.items():
        if name in classes:
            raise NotImplementedError(f"model must not be a {name}: {reason}")
    known = ", ".join(f"{family.name} ({family.model_class})" for family in FAMILIES)
    raise TypeError(f"model must be of a supported family: {known}; got {type(model).__name__}")
