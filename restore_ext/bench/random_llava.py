"""A model of LLaVA's shape with random weights, of any size: its times are a model's."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from restore_ext.testing.zoo import IMAGE, PATCH, TEXT, VOCABULARY

BEFORE, BEHIND = 35, 20  # words of a prompt before and behind its picture


@dataclass(frozen=True)
class Shape:
    """By default small enough for a CPU."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    inner: int = 256
    side: int = 8  # of the picture, in patches
    vision_layers: int = 2
    vision_hidden: int = 64

    @staticmethod
    def of(layers: int, hidden: int, side: int) -> "Shape":
        """In about LLaVA-1.5's proportions: heads of 64, a tower of half the width and depth, but
        of five blocks at least, for tome_vit halves the tokens once in each."""
        tower = max(5, layers // 2), max(64, hidden // 2)
        for width in (hidden, tower[1]):
            if width % (width // 64 or 1):
                raise ValueError(
                    f"the widths {hidden} of the language model and {tower[1]} of the tower must "
                    f"divide into heads of about 64, got {width} for {width // 64} heads"
                )
        return Shape(layers, hidden, max(1, hidden // 64), hidden * 11 // 4, side, *tower)

    def __str__(self) -> str:
        return f"random LLaVA, {self.layers} x {self.hidden}, {self.side**2} visual tokens"


def prompt(shape: Shape, B: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """B prompts of one picture each."""
    g = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY - 4, (B, BEFORE + BEHIND), generator=g)
    picture = torch.full((B, shape.side**2), IMAGE)
    ids = torch.cat([text[:, :BEFORE], picture, text[:, BEFORE:]], 1).to(device)
    side = shape.side * PATCH
    pixels = torch.randn(B, 3, side, side, generator=g).to(device, dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def build(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """The model, in eval mode."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_hidden // 64 or 1,
        image_size=shape.side * PATCH,
        patch_size=PATCH,
        projection_dim=shape.vision_hidden,
    )
    text = TEXT | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
    }
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=shape.side**2,
    )
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    g = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1 if "embed" in name else 1 / math.sqrt(p[0].numel()), generator=g)
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = TEXT["pad_token_id"]
    return model.eval()
