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
# Whether the forwards that follow are chunks of one prompt.
_CHUNKS: ContextVar[bool] = ContextVar("restore_ext_chunks", default=False)

# Raises where a prompt, its other inputs given, would be reduced and so cannot be cut into chunks.
RefuseChunks = Callable[[Tensor, dict[str, Any], int], None]


def watch_generation(patches: Patches, model: nn.Module, refuse_chunks: RefuseChunks) -> None:
    """Makes continuous batching raise on this model, and lets prefill in chunks be refused; notes
    the drafts of assisted decoding."""
    for name in _CONTINUOUS:
        if hasattr(model, name):
            patches.set(model, name, _refuse_continuous)
    for name in _PREFILL:
        if hasattr(model, name):
            patches.set(model, name, _noting_chunks(getattr(model, name), refuse_chunks))
    if hasattr(model, _CANDIDATES):
        patches.set(model, _CANDIDATES, _noting_drafts(getattr(model, _CANDIDATES)))


def drafted(tokens: int) -> int:
    """How many tokens at the end of a forward of so many were not said, but drafted.

    Assisted decoding hands over the prompt with the first draft behind it.
    """
    length, draft = _DRAFT.get()
    _DRAFT.set((0, 0))
    return draft if length == tokens else 0


def in_chunks() -> bool:
    """Whether this forward has a chunk of a prompt that is not reduced: it is stock's alone."""
    return _CHUNKS.get()


def _refuse_continuous(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        "continuous batching (generate_batch) has no images to reduce: use generate(), or detach"
    )


def _noting_chunks(prefill: Callable[..., Any], refuse: RefuseChunks) -> Callable[..., Any]:
    @functools.wraps(prefill)
    def noting(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        size = generation_config.prefill_chunk_size
        if size is not None:
            refuse(input_ids, {**(args[0] if args else {}), **kwargs}, size)
        token = _CHUNKS.set(size is not None)
        try:
            return prefill(input_ids, generation_config, *args, **kwargs)
        finally:
            _CHUNKS.reset(token)

    return noting


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
