"""Loads any supported checkpoint with its processor, and says in one line why it cannot."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from restore_ext.checks import require_kernels
from restore_ext.cli.errors import UserError
from restore_ext.pocket import is_pocket, resolve
from restore_ext.text import one_line


def quiet() -> None:
    """Keeps progress bars and retry messages of the libraries below out of the output."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


def load(
    name: str,
    device: str,
    dtype: str,
    option: str = "--model",
    device_option: str = "--device",
    kernels: bool = True,
    **loading: Any,
) -> tuple[Any, Any]:
    """(model, processor) of a hub id, a folder, or "pocket"; the model in eval mode on `device`.

    dtype    of the weights, or "auto": as they were saved
    option, device_option  what an error calls the name, and the device
    kernels  whether the device must have our operators; False where attach() is to say so
    loading  more for from_pretrained(); with a device_map, which says where, `device` is not moved
             to
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    target = require_device(device, device_option, kernels)
    folder = resolve(name)
    local = Path(folder).is_dir()
    if local and not (Path(folder) / "config.json").is_file():
        raise UserError(f"{option}: the folder {name} has no config.json")
    if not local and (Path(folder).exists() or folder.startswith((".", "/", "~"))):
        raise UserError(f"{option}: {name} is not a folder with a model")
    if not local:
        print(f"looking for {name} in the cache and on the hub", file=sys.stderr)
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    source = {n: v for n, v in loading.items() if n in ("revision", "trust_remote_code")}
    try:
        # Before the rest: an unknown name fails once, not once for every file of a processor.
        AutoConfig.from_pretrained(folder, **source)
        processor = AutoProcessor.from_pretrained(folder, **source)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=weights, **loading)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{option}: {_reason(name, error)}") from error
    return (model.eval() if "device_map" in loading else model.eval().to(target)), processor


def encode_prompt(
    model_name: str, processor: Any, image: Any, prompt: str, model: Any
) -> dict[str, Any]:
    """Inputs of `model` for one picture and one prompt, through the processor's chat template."""
    return encode_prompts(model_name, processor, [image], [prompt], model)


def encode_prompts(
    model_name: str, processor: Any, images: Sequence[Any], prompts: Sequence[str], model: Any
) -> dict[str, Any]:
    """The same for a batch, a picture to each prompt."""
    from restore_ext.pocket import encode

    try:
        if is_pocket(model_name):
            encoded = encode(processor, images, prompts)
        else:
            texts = []
            for prompt in prompts:
                content = [{"type": "image"}, {"type": "text", "text": prompt}]
                chat = [{"role": "user", "content": content}]
                texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
            encoded = dict(
                processor(
                    images=list(images), text=texts, padding=len(texts) > 1, return_tensors="pt"
                )
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"the prompt cannot be encoded: {one_line(error)}") from error
    return to_model(encoded, model)


def check_room(model: Any, inputs: dict[str, Any], new_tokens: int) -> None:
    """Raises UserError if a prompt and so many new tokens are more than the model has positions
    for; original positions count, so fewer visual tokens make no room."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if room is not None and length + new_tokens > room:
        raise UserError(
            f"--new-tokens must be at most {max(room - length, 0)} here: the model has {room} "
            f"positions, and the prompt takes {length}, got {new_tokens}"
        )


def to_model(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Inputs where the model is, floats in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def require_device(name: str, option: str = "--device", kernels: bool = True) -> torch.device:
    """The device of that name, which must be there and, with `kernels`, have our operators."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise NotImplementedError("it holds no numbers")
        torch.empty(0, device=device)
        if kernels:
            require_kernels("the model", device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{option}: {name} cannot be used: {one_line(error)}") from error
    return device


def _reason(name: str, error: BaseException) -> str:
    """Why a checkpoint could not be loaded, found in the chain of exceptions under `error`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    chain = list(_chain(error))
    if any("torchvision" in str(e).lower() for e in chain if isinstance(e, ImportError)):
        version = torch.__version__.split("+")[0]
        return (
            f"the processor of {name} needs torchvision, the one made for your torch: "
            f'pip install torchvision "torch=={version}"'
        )
    if any(isinstance(e, GatedRepoError) for e in chain):
        return f"{name} is gated: ask for access on the hub and log in (hf auth login)"
    if any(isinstance(e, (RepositoryNotFoundError, HFValidationError)) for e in chain):
        return f"there is no folder and no model on the hub named {name}"
    if any(isinstance(e, (LocalEntryNotFoundError, OfflineModeIsEnabled)) for e in chain):
        return (
            f"{name} is not a folder and not in the cache, and the hub cannot be reached; "
            "pocket needs no download"
        )
    return f"{name} cannot be loaded: {one_line(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
