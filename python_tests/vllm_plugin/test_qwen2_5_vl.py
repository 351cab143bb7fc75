"""Qwen2.5-VL under vLLM answers as attach() does, on as few tokens."""

import pytest
from engines import QWEN, Prompt, check_against_transformers
from PIL import Image

PIXELS = 28  # of a token's side
WAYS = {
    "divprune": {"method": "divprune", "keep": 9},
    "plain": {"method": "divprune", "keep": 6, "restore": False},
    "received": {"method": "vispruner", "keep": 8},
    "received and keys": {"method": "visionzip", "keep_ratio": 0.4},
}


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.effect_noise((width * PIXELS, height * PIXELS), 40 + 30 * seed).convert("RGB")


def prompts() -> list[Prompt]:
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    one, two, three = picture(4, 6, 0), picture(7, 3, 1), picture(5, 5, 2)
    return [
        Prompt(f"w10 w11 {image} w12 w13 w14", [one]),
        Prompt(f"{image} w20", [two]),
        Prompt(f"w30 {image} {image} w31 w32", [three, picture(4, 4, 3)]),
    ]


@pytest.mark.parametrize("way", WAYS)
def test_answers_as_attach(way, engines, qwen, monkeypatch):
    model, processor, folder = qwen
    options = WAYS[way]
    engine = engines(options, folder, QWEN)
    check_against_transformers(monkeypatch, engine, options, model, processor, prompts())
