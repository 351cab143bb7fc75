"""LLaVA-1.5 and its like: every picture is one grid of patches, and every patch a token."""

from restore_ext.hf.families.vit import Vit


class Llava(Vit):
    """Methods may act on the picture, or in the tower, where its blocks are CLIP's."""

    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    models = "LLaVA-1.5, BakLLaVA, Pixtral-12B"
    scores_from = "CLS, in the layer of the features; received, where the tower has no CLS"
