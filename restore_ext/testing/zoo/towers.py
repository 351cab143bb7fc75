"""Configs of tiny vision towers."""

from typing import Any

import transformers

from restore_ext.testing.zoo import PATCH

VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}


def clip(side: int) -> Any:
    """A CLIP for images of side x side patches."""
    return transformers.CLIPVisionConfig(**VIT, image_size=side * PATCH, projection_dim=32)


def siglip(side: int) -> Any:
    """A SigLIP for images of side x side patches."""
    return transformers.SiglipVisionConfig(**VIT, image_size=side * PATCH, vision_use_head=False)
