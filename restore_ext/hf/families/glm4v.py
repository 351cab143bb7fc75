"""GLM-4.1V: a ViT that merges 2 x 2 patches, a language model with partial M-RoPE."""

from restore_ext.hf.families.qwen2_vl import Qwen2VL


class Glm4v(Qwen2VL):
    """Scores as in Qwen2-VL. A video has the same placeholders as an image, so that a prompt has
    the one or the other; videos are left as they are."""

    name = "glm4v"
    model_class = "Glm4vForConditionalGeneration"
    models = "GLM-4.1V"
