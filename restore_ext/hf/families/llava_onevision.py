"""LLaVA-OneVision: LLaVA-NeXT's tiles of a SigLIP, several images, videos."""

from restore_ext.hf.families.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    """Large images are packed at a lower resolution; scores and tower features with them."""

    name = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    models = "LLaVA-OneVision"
    scores_from = "received, in the layer of the features"
    notes = LlavaNext.notes + "; videos are left as they are"
