"""Tiny Qwen-VLs and GLM-4V: pictures and videos of any even size, 2 x 2 patches to a token."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import (
    BOS,
    EOS,
    IMAGE,
    MROPE_SECTION,
    PATCH,
    VERSION,
    VIDEO,
    VISION_END,
    VISION_START,
    Picture,
    Tiny,
    Video,
)

VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
INTERLEAVED_SECTION = [6, 5, 5]
PARTIAL_SECTION = [2, 3, 3]  # GLM-4V turns half of a head


def rope(section: list[int], **more: Any) -> dict[str, Any]:
    """The words of a text config for M-RoPE, of before and after 5.0."""
    kind = {"rope_type": "default", "mrope_section": section, **more}
    if VERSION < (5, 0):
        return {"rope_theta": 10000.0, "rope_scaling": kind}
    return {"rope_parameters": {"rope_theta": 10000.0, **kind}}


def qwen2_vl(text: dict[str, Any]) -> Any:
    size = text["hidden_size"]  # of its vision config the output's; embed_dim is the tower's
    vision = {**VISION, "embed_dim": 32, "hidden_size": size, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(
        vision_config=vision,
        text_config={**text, **rope(MROPE_SECTION, type="mrope")},
        **TOKENS,
    )


def qwen2_5_vl(text: dict[str, Any]) -> Any:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": MROPE_SECTION}
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            **VISION,
            "out_hidden_size": text["hidden_size"],
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        },
        text_config={**text, "rope_theta": 10000.0, "rope_scaling": rope},
        **TOKENS,
    )


def qwen3_vl(text: dict[str, Any]) -> Any:
    return transformers.Qwen3VLConfig(
        vision_config={
            **VISION,
            "depth": 4,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        },
        text_config={"head_dim": 32, **text, **rope(INTERLEAVED_SECTION, mrope_interleaved=True)},
        **TOKENS,
    )


def glm4v(text: dict[str, Any]) -> Any:
    partial = {"partial_rotary_factor": 0.5}
    return transformers.Glm4vConfig(
        vision_config={**VISION, "out_hidden_size": text["hidden_size"], "image_size": 8 * PATCH},
        text_config={**text, **rope(PARTIAL_SECTION, **partial), **partial},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=BOS,  # which no text has
        video_end_token_id=EOS,
    )


def encode(
    picture: Picture | Video, generator: torch.Generator, frame_by_frame: bool = False
) -> tuple[list[int], dict[str, Tensor]]:
    """Tokens and inputs; with frame_by_frame the frames of a video are apart in the sequence."""
    frames = getattr(picture, "frames", 1)
    patches = picture.height * picture.width
    pixels = torch.randn(frames * patches, 3 * 2 * PATCH**2, generator=generator)
    grid = torch.tensor([[frames, picture.height, picture.width]])
    if isinstance(picture, Picture):
        ids = [VISION_START, *[IMAGE] * (patches // 4), VISION_END]
        return ids, {"pixel_values": pixels, "image_grid_thw": grid}
    runs = [1] * frames if frame_by_frame else [frames]
    ids = [i for n in runs for i in (VISION_START, *[VIDEO] * (n * patches // 4), VISION_END)]
    return ids, {"pixel_values_videos": pixels, "video_grid_thw": grid}


def encode_frames(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    return encode(picture, generator, frame_by_frame=True)


def encode_marked(
    picture: Picture | Video, generator: torch.Generator
) -> tuple[list[int], dict[str, Tensor]]:
    """As GLM-4V: images in all but the marks around a video."""
    ids, tensors = encode_frames(picture, generator)
    if isinstance(picture, Picture):
        return ids, tensors
    return [BOS, *(IMAGE if i == VIDEO else i for i in ids), EOS], tensors


def per_marked_row(input_ids: Tensor) -> dict[str, Tensor]:
    if VERSION < (5, 0):
        return {}
    within = (input_ids == BOS).cumsum(1) - (input_ids == EOS).cumsum(1)
    return {"mm_token_type_ids": (input_ids == IMAGE) * (1 + within)}


def per_row(input_ids: Tensor) -> dict[str, Tensor]:
    if VERSION < (5, 0):
        return {}
    return {"mm_token_type_ids": (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()}


def _tiny(
    model_class: str,
    config: Callable[..., Any],
    encode: Callable[..., Any],
    per_row: Callable[[Tensor], dict[str, Tensor]] = per_row,
) -> Tiny:
    return Tiny(model_class, config, encode, per_row=per_row, videos=True)


QWEN2_VL = _tiny("Qwen2VLForConditionalGeneration", qwen2_vl, encode)
QWEN2_5_VL = _tiny("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, encode)
QWEN3_VL = _tiny("Qwen3VLForConditionalGeneration", qwen3_vl, encode_frames)
GLM4V = _tiny("Glm4vForConditionalGeneration", glm4v, encode_marked, per_marked_row)
