"""What generate() does without telling the model: some of it to be known, some to be refused."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from restore_ext.hf.patches import Patches

_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_PREFILL = ("_prefill", "_prefill_chunking")  # from 5.0 on; 4.57, for chunks alone
_CANDIDATES = "_get_candidate_generator"

# Of the forward that follows: its tokens, and how many at the end are a draft to be verified.
_DRAFT: ContextVar[tuple[int, int]] = ContextVar("restore_ext_draft", default=(0, 0))


def watch_generation(patches: Patches, model: nn.Module, enabled: Callable[[], bool]) -> None:
    """Makes continuous batching, and prefill in chunks if there are images, raise on this model;
    notes the drafts of assisted decoding."""
    for name in _CONTINUOUS:
        if hasattr(model, name):
            patches.set(model, name, _refuse_continuous)
    for name in _PREFILL:
        if hasattr(model, name):
            patches.set(model, name, _without_chunks(getattr(model, name), enabled))
    if hasattr(model, _CANDIDATES):
        patches.set(model, _CANDIDATES, _noting_drafts(getattr(model, _CANDIDATES)))


def drafted(tokens: int) -> int:
    """How many tokens at the end of a forward of so many were not said, but drafted.

    Assisted decoding hands over the prompt with the first draft behind it.
    """
    length, draft = _DRAFT.get()
    _DRAFT.set((0, 0))
    return draft if length == tokens else 0


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


def _noting_drafts(candidate_generator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(candidate_generator)
    def noting(*args: Any, **kwargs: Any) -> Any:
        generator = candidate_generator(*args, **kwargs)  # of this one call of generate()
        propose = generator.get_candidates

        @functools.wraps(propose)
        def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            candidates = propose(input_ids, *args, **kwargs)
            length = candidates[0].shape[1]
            _DRAFT.set((length, length - input_ids.shape[1]))
            return candidates

        generator.get_candidates = get_candidates
        return generator

    return noting
