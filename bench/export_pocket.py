"""Writes the folder of the built-in model: weights, configs, tokenizer, processor, chat template.

The files are written key by key, not by save_pretrained, so that one folder loads in every
supported transformers: class and weight names are those that 4.57 knows and 5.x still maps.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from restore_ext.pocket.scenes import ID, SIDE, SPECIAL, SYSTEM, WORDS

LIMIT = 16 * 2**20  # bytes of weights the package may carry

# The order of the training chats: the picture first in its turn, then the words.
TEMPLATE = (
    SYSTEM + "{% for message in messages %} {{ message['role'] }} :"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %} <image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)


def export(source: Path, target: Path) -> None:
    """Writes to `target` the model whose config.json and model.safetensors stand in `source`.

    Raises FileNotFoundError if they do not, ValueError if the vocabulary is another or the weights
    are larger than the package may carry.
    """
    config = json.loads((source / "config.json").read_text())
    if config["text_config"]["vocab_size"] != len(WORDS):
        wanted, got = len(WORDS), config["text_config"]["vocab_size"]
        raise ValueError(f"{source}: vocab_size must be {wanted}, got {got}")
    weights = {_classic_name(k): v for k, v in load_file(source / "model.safetensors").items()}
    total = sum(v.numel() * v.element_size() for v in weights.values())
    if total > LIMIT:
        raise ValueError(f"{source}: weights must be at most {LIMIT} bytes, got {total}")
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    patch = config["vision_config"]["patch_size"]
    _write(target / "config.json", _model_config(config))
    # An answer is one word: training says nothing about what comes after it.
    ends = {"bos_token_id": ID["<s>"], "eos_token_id": ID["</s>"], "pad_token_id": ID["<pad>"]}
    _write(target / "generation_config.json", {**ends, "max_new_tokens": 1})
    _tokenizer().save(str(target / "tokenizer.json"))
    _write(target / "tokenizer_config.json", _tokenizer_config())
    _write(target / "preprocessor_config.json", _image_config())
    _write(target / "processor_config.json", _processor_config(patch))
    (target / "chat_template.jinja").write_text(TEMPLATE)


def _classic_name(name: str) -> str:
    """A weight's name as the LLaVA 1.5 checkpoints have it, whatever transformers saved it."""
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(tower + "vision_model."):
        return name.replace(tower, tower + "vision_model.", 1)
    return name


def _model_config(config: dict[str, Any]) -> dict[str, Any]:
    text = {**config["text_config"]}
    text["rope_theta"] = text.pop("rope_parameters", {"rope_theta": 10000.0})["rope_theta"]
    kept = {k: v for k, v in config.items() if k != "transformers_version"}
    return {**kept, "text_config": text}


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # also sets punctuation apart
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }


def _image_config() -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 3,
        "do_center_crop": False,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def _processor_config(patch: int) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
