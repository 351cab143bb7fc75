"""LLaVA-OneVision: LLaVA-NeXT's tiles of a SigLIP, several images, videos."""

from typing import Any

from torch import Tensor

from restore_ext.hf.compat import video_pixels
from restore_ext.hf.families.llava_next import LlavaNext
from restore_ext.hf.vision import VIDEO, Record


class LlavaOnevision(LlavaNext):
    """Large images are packed at a lower resolution; scores and tower features with them. The
    frames of a video are pooled to a quarter of their tokens, and so are these."""

    name = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    models = "LLaVA-OneVision"
    scores_from = "received, in the layer of the features"
    videos = "the newline behind the last frame is kept"
    video_token_name = "video_token_id"

    def frames(self, inputs: dict[str, Any]) -> list[list[int]]:
        videos, frames = video_pixels(inputs).shape[:2]
        vision = self.model.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)
        return [[side**2] * frames for _ in range(videos)]

    @property
    def closing(self) -> Tensor:
        return self.inner.image_newline

    def of_tokens(self, patches: Tensor, record: Record, inputs: dict[str, Any]) -> Tensor:
        if record.kind == VIDEO:
            return self.inner.apply_pooling(patches).flatten(0, 1)
        return super().of_tokens(patches, record, inputs)

    def metric(self, record: Record) -> Tensor:
        if record.kind == VIDEO:
            assert record.tower is not None
            return self.inner.apply_pooling(record.tower).flatten(0, 1)
        return super().metric(record)
