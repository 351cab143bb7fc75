"""PaliGemma: a SigLIP, a linear projector, a Gemma that sees the whole prompt forward and back."""

from typing import Any

from torch import Tensor, nn

from restore_ext.hf.compat import prompt_blocks
from restore_ext.hf.families.vit import Vit
from restore_ext.hf.settings import Settings


class PaliGemma(Vit):
    """The prompt, token_type_ids 0, stays bidirectional when its images have fewer tokens."""

    name = "paligemma"
    model_class = "PaliGemmaForConditionalGeneration"
    models = "PaliGemma, PaliGemma 2"
    scores_from = "received, in the last layer"
    notes = "the prompt stays bidirectional; attach() only"
    feature_layer = -1

    @property
    def behind_blocks(self) -> nn.Module:
        norms = (m for n, m in self.tower.named_modules() if n.endswith("post_layernorm"))
        return next(norms)

    def require_prepared(self, settings: Settings) -> None:
        raise NotImplementedError(
            "model: prepare_inputs() cannot serve PaliGemma: generate() would see a prompt of "
            "embeddings as causal; use attach()"
        )

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        return prompt_blocks(self.inner, inputs)
