"""PaliGemma: a SigLIP, a linear projector, a Gemma that sees the whole prompt forward and back."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from restore_ext.hf.compat import prompt_blocks
from restore_ext.hf.families.family import Family
from restore_ext.hf.families.llava import TOWER_METRIC
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import (
    Record,
    last_attention,
    received_attention,
    watch_attention,
    watch_projector,
)


class PaliGemma(Family):
    """There is no CLS token: scores are the attention a patch receives in the tower's last layer.
    The prompt (token_type_ids 0) stays bidirectional when its images have fewer tokens."""

    name = "paligemma"
    model_class = "PaliGemmaForConditionalGeneration"
    axes = 1
    models = "PaliGemma, PaliGemma 2"
    scores_from = "received, in the last layer"
    notes = "the prompt stays bidirectional"

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        return prompt_blocks(self.inner, inputs)

    def watch(self, patches: Patches, settings: Settings) -> None:
        if settings.method in TOWER_METRIC:
            watch_projector(patches, self.inner.multi_modal_projector)
        if settings.needs_scores:
            scored = last_attention(self.inner.vision_tower)
            watch_attention(patches, scored, received_attention)

    def scores(self, record: Record, tokens: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        return record.attention[-1].flatten()
