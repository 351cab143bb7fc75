"""Visual token reduction for multimodal LLMs, with RESTORE: positions and attention mass kept."""

import importlib
from typing import TYPE_CHECKING, Any

from restore_ext.config import show_config
from restore_ext.methods import list_methods
from restore_ext.ops import (
    assign_anchors,
    calibrated_attention,
    calibrated_attention_paged,
    match_bipartite,
    merge_tokens,
    row_scores,
    score_anchors,
    select_anchors,
    select_diverse,
)
from restore_ext.reduce import reduce_tokens
from restore_ext.reduction import Reduction
from restore_ext.rope import rope_decay

if TYPE_CHECKING:
    from restore_ext import search
    from restore_ext.hf import (
        attach,
        diagnose,
        find_withdrawal_layer,
        list_families,
        prepare_inputs,
    )

__version__ = "0.1.0"
__all__ = [
    "Reduction",
    "assign_anchors",
    "attach",
    "calibrated_attention",
    "calibrated_attention_paged",
    "diagnose",
    "find_withdrawal_layer",
    "list_families",
    "list_methods",
    "match_bipartite",
    "merge_tokens",
    "prepare_inputs",
    "reduce_tokens",
    "rope_decay",
    "row_scores",
    "score_anchors",
    "search",
    "select_anchors",
    "select_diverse",
    "show_config",
]


_OF_HF = ("attach", "diagnose", "find_withdrawal_layer", "list_families", "prepare_inputs")


def __getattr__(name: str) -> Any:
    # The hook needs transformers, the rest of the package does not.
    if name in _OF_HF:
        from restore_ext import hf

        return getattr(hf, name)
    if name == "search":
        return importlib.import_module("restore_ext.search")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
