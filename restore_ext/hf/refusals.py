"""Ways to generate that never show the hooks a whole prompt with its images."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from restore_ext.hf.patches import Patches

_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_PREFILL = ("_prefill", "_prefill_chunking")  # from 5.0 on; 4.57, for chunks alone


def refuse_what_hides_images(
    patches: Patches, model: nn.Module, enabled: Callable[[], bool]
) -> None:
    """Makes continuous batching, and prefill in chunks if there are images, raise on this model."""
    for name in _CONTINUOUS:
        if hasattr(model, name):
            patches.set(model, name, _refuse_continuous)
    for name in _PREFILL:
        if hasattr(model, name):
            patches.set(model, name, _without_chunks(getattr(model, name), enabled))


def _refuse_continuous(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        "continuous batching (generate_batch) has no images to reduce: use generate(), or detach"
    )


def _without_chunks(prefill: Callable[..., Any], enabled: Callable[[], bool]) -> Callable[..., Any]:
    @functools.wraps(prefill)
    def whole(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = {**(args[0] if args else {}), **kwargs}
        images = inputs.get("pixel_values") is not None or inputs.get("mm_encoder_outputs")
        size = generation_config.prefill_chunk_size
        if enabled() and images and size is not None:
            raise NotImplementedError(
                "prefill_chunk_size must be None where images are reduced, which a chunk would cut "
                f"up, got {size}"
            )
        return prefill(input_ids, generation_config, *args, **kwargs)

    return whole
