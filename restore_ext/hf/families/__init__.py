"""The model families that can be hooked: one a file, each no more than what is its own."""

from typing import Any

from restore_ext.hf.families.family import Family
from restore_ext.hf.families.llava import Llava
from restore_ext.hf.families.qwen2_5_vl import Qwen2_5_VL

__all__ = ["FAMILIES", "Family", "find_family"]

FAMILIES: tuple[type[Family], ...] = (Llava, Qwen2_5_VL)


def find_family(model: Any) -> Family:
    """The family of a model; TypeError, listing those there are, if it has none."""
    classes = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if family.model_class in classes:
            return family(model)
    known = ", ".join(f"{family.name} ({family.model_class})" for family in FAMILIES)
    raise TypeError(f"model must be of a supported family: {known}; got {type(model).__name__}")
