"""GLM-4.1V: a ViT that merges 2 x 2 patches, a language model with partial M-RoPE."""

from restore_ext.hf.families.qwen2_vl import Qwen2VL


class Glm4v(Qwen2VL):
    """Scores as in Qwen2-VL. A frame of a video has the placeholders of an image, which the model
    tells apart by what else it is given: a batch has images or videos."""

    name = "glm4v"
    model_class = "Glm4vForConditionalGeneration"
    models = "GLM-4.1V"
    videos = (
        "two pictures in one frame; the time stamps between are text; a batch has images or videos"
    )
    video_token_name = "image_token_id"
    smaller_pictures = "give its processor a smaller size['longest_edge'], which counts pixels"
