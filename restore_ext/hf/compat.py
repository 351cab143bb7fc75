"""Where the versions of transformers differ (4.57.6 to 5.x). Nothing else in this folder asks."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = 'pip install "transformers>=4.57.6,<6" accelerate pillow'

try:
    import transformers
    from packaging.version import Version  # comes with transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        f"attach and prepare_inputs need transformers >= 4.57.6: {INSTALL}", name=error.name
    ) from error

VERSION = Version(transformers.__version__).release
OLDEST = (4, 57, 6)

# From 5.0 on encoders return objects, unless return_dict is False.
ENCODERS_RETURN_OBJECTS = VERSION >= (5, 0)

# From 5.3 on generate() carries explicit position_ids from step to step.
GENERATE_CARRIES_POSITIONS = VERSION >= (5, 3)

if VERSION < OLDEST:
    raise ImportError(
        f"transformers must be 4.57.6 or newer, got {transformers.__version__}: {INSTALL}"
    )


def encodes_before_forward(model: nn.Module) -> bool:
    """From 5.18 on generate() encodes images once, before it expands the beams."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def image_features(output: Any) -> list[Tensor]:
    """The projected features [N, C], image by image or row by row, in what get_image_features()
    returned: 4.57 returns them, 5.x an object with them; a tensor where all are of one size."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, tuple) and features and not isinstance(features[0], Tensor):
        features = features[0]  # 4.57: what Qwen3-VL adds later is beside them
    if isinstance(features, Tensor) and features.dim() == 4:
        features = features.flatten(1, 2)  # 4.57: Aya Vision's [images, rows, columns, C]
    return list(features) if isinstance(features, (list, tuple, Tensor)) else []


def video_features(output: Any, tokens: Sequence[int], closing: Tensor | None) -> list[Tensor]:
    """The projected features [N, C], video by video, in what get_video_features() returned.

    tokens   of the frames of each video
    closing  [C], what follows the last frame; before 5.18 the model adds it later
    """
    videos = image_features(output)
    if closing is None:
        return videos
    return [
        video if len(video) > n else torch.cat([video, closing[None].to(video)])
        for video, n in zip(videos, tokens, strict=True)
    ]


def video_pixels(inputs: dict[str, Any]) -> Tensor:
    """[videos, frames, 3, H, W] among the inputs of LLaVA-OneVision's get_video_features()."""
    renamed = inputs.get("pixel_values_videos")
    return inputs["pixel_values"] if renamed is None else renamed  # from 5.18 on


def encoder_inputs(inner: nn.Module, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of a model's inputs that its get_image_features() or get_video_features() takes, for
    `kind` "image" or "video"."""
    known = inspect.signature(getattr(inner, f"get_{kind}_features")).parameters
    unnamed: tuple[str, ...] = ()
    if kind == "image" and "kwargs" in known:
        unnamed = ("image_sizes",)  # before 5.18 LLaVA's does not name what a Pixtral needs
    if kind == "video" and "pixel_values" in known:  # LLaVA-OneVision's, before 5.18
        inputs = {**inputs, "pixel_values": inputs["pixel_values_videos"]}
        for name, parameter in known.items():  # in 4.57 all have to be given
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                inputs.setdefault(name, getattr(inner.config, name, None))
    names = (*known, *unnamed)
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def attention_named(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function `module` calls when its config says `name`.

    "eager" is in no registry: each modeling file has its own.
    """
    modeling = sys.modules[type(module).__module__]
    if name == "eager":
        return modeling.eager_attention_forward
    return getattr(modeling, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[name]


def window_cuts_images(inner: nn.Module) -> bool:
    """Whether a sliding window of Gemma 3 holds within an image, which sees itself: later in 5.x it
    does, before an image of a sliding layer was seen whole."""
    return hasattr(sys.modules[type(inner).__module__], "create_masks_for_vision_model")


def prompt_blocks(inner: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """[B, L] int64, 0 where PaliGemma's prompt sees itself forward, -1 elsewhere: from its inner
    model's arguments. All is prompt where nothing is said (what stock then does depends on version,
    attention and padding), and in 4.57, which does not ask."""
    kinds = inputs.get("token_type_ids")
    if kinds is None or hasattr(inner, "_update_causal_mask"):
        ids = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if ids is None else ids
        return torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    return torch.where(kinds == 0, 0, -1)


def layer_rotation(layer: Any, inputs: dict[str, Any]) -> Any:
    """The position embeddings among a decoder layer's arguments; of two in Gemma 3 of 4.57."""
    if "position_embeddings" in inputs:
        return inputs["position_embeddings"]
    return inputs[f"position_embeddings_{'local' if layer.self_attn.is_sliding else 'global'}"]


def turned(lm: Any, layer: int, name: str, hidden: Tensor, positions: Tensor) -> Any:
    """What a language model hands a layer as its argument `name`, position embeddings, of positions
    [..., B, T]; Gemma 3 has two kinds, which 4.57 hands on both."""
    if name.endswith("_local"):
        return lm.rotary_emb_local(hidden, positions)
    if "layer_type" in inspect.signature(lm.rotary_emb.forward).parameters:
        return lm.rotary_emb(hidden, positions, lm.config.layer_types[layer])
    return lm.rotary_emb(hidden, positions)


def generation_positions(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The position ids generate() would start from: [B, S], with M-RoPE [4, B, S] (5.3 on)."""
    return model._prepare_position_ids_for_generation(input_ids, {"input_ids": input_ids, **inputs})
