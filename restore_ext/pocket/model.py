"""The built-in model: a LLaVA of 2.6 million parameters that answers to the name "pocket"."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from restore_ext.pocket.scenes import parse

POCKET_NAME = "pocket"
FOLDER = Path(__file__).parent / "model"
VISUAL_TOKENS, DEPTH = 576, 4  # of a picture; decoder layers


def resolve(name: str) -> str:
    """The folder of the built-in model for its name; any other name or folder as it is."""
    return str(FOLDER) if name == POCKET_NAME else name


def is_pocket(name: str) -> bool:
    """Whether `name` is the built-in model, by name or by folder."""
    return Path(resolve(name)).resolve() == FOLDER.resolve()


def load_pocket(folder: str | Path = FOLDER) -> tuple[Any, Any]:
    """(model, processor) of the built-in model, or of a folder that `bench.train_pocket` exported.

    The model is a LlavaForConditionalGeneration in float32, in eval mode, on the CPU: CLIP ViT
    4 x 128 on 96 x 96 pixels in patches of 4, a projector, Llama 4 x 192. The processor is a
    LlavaProcessor with a chat template, padding on the left.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(str(folder))
    model = AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32)
    return model.eval(), processor


def encode(
    processor: Any, images: Sequence[Image.Image], questions: Sequence[str]
) -> dict[str, Tensor]:
    """Model inputs for one question a picture: input_ids and attention_mask [B, S], pixel_values.

    Raises ValueError for a question with a word outside the vocabulary.
    """
    prompts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": " ".join(parse(question))}]
        chat = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    return dict(processor(images=list(images), text=prompts, padding=True, return_tensors="pt"))
