"""SmolVLM: Idefics3 in small."""

from restore_ext.hf.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    name = "smolvlm"
    model_class = "SmolVLMForConditionalGeneration"
    models = "SmolVLM, SmolVLM2"
