"""The images and the videos of a batch of prompts, as one list of images in the prompts' order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from restore_ext.hf.compat import ENCODERS_RETURN_OBJECTS, encoder_inputs, image_features
from restore_ext.hf.images import images_of_rows, one_by_one, originals
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import IMAGE, VIDEO, Seen, recall, recording

if TYPE_CHECKING:
    from restore_ext.hf.families import Family

PIXELS = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}


@dataclass(frozen=True)
class Visuals:
    """The images of B prompts of S tokens, frames of videos among them."""

    at: Tensor  # [B, S] bool, where their features go
    features: list[Tensor]  # [N, C] of each, separators included; the beams of a row repeat its own
    seen: Seen  # of those that were encoded
    is_frame: list[bool]  # whether each is a frame of a video


def pixels_of(family: "Family") -> str:
    """The names of the inputs that bring images or videos, as a message has them."""
    return " or ".join(PIXELS[kind] for kind in family.kinds)


def kinds_of(family: "Family", inputs: Mapping[str, Any]) -> list[str]:
    """What a forward, or generate(), of these inputs brings: IMAGE, VIDEO.

    raises  NotImplementedError: both, where their placeholders are the same
    """
    encoded = inputs.get("mm_encoder_outputs") or {}
    kinds = [
        kind
        for kind in family.kinds
        if encoded.get(kind) is not None or inputs.get(PIXELS[kind]) is not None
    ]
    if len({family.token(kind) for kind in kinds}) < len(kinds):
        raise NotImplementedError(
            f"pixel_values must be None beside pixel_values_videos for {family.name}, where images "
            "and videos have the same placeholder: give them in batches of their own"
        )
    return kinds


def remembered(encoded: Any, kind: str, at: Tensor) -> tuple[list[Tensor], Seen] | None:
    """The features of each image, or frame, in what get_image_features() or get_video_features()
    returned, and what was seen beside them; None if there are no features. at [B, S] bool."""
    features, seen = image_features(encoded), recall(encoded)
    if not features:
        return None
    if seen is None:
        raise NotImplementedError(
            f"mm_encoder_outputs must come whole from get_{kind}_features() of this model, "
            "attached and enabled; got features of elsewhere (accelerate copies them where it "
            "dispatches a model that is attached: attach after that)"
        )
    return one_by_one(features, seen, lambda: at.sum(1).tolist()), seen


def encode(
    family: "Family", settings: Settings, inputs: dict[str, Any], input_ids: Tensor
) -> Visuals | None:
    """The visuals of a processor's inputs, encoded for a method that need not be attached; None if
    there are none."""
    streams = []
    patches = Patches()
    try:
        family.install(patches, settings)
        for kind in kinds_of(family, inputs):
            # The class's own: the instance's may be that of attach(), for a method of its own.
            function = getattr(type(family.inner), f"get_{kind}_features")
            asked = encoder_inputs(family.inner, kind, inputs)
            how = {"return_dict": True} if ENCODERS_RETURN_OBJECTS else {}
            with recording(settings, kind) as record:
                output = function(family.inner, **asked, **how)
            features, seen = family.see(record, output, asked)
            at = family.placeholders(input_ids, None, kind)
            streams.append(Visuals(at, features, seen, [kind == VIDEO] * len(features)))
    finally:
        patches.undo()
    return in_prompt_order(streams) if streams else None


def in_prompt_order(streams: Sequence[Visuals]) -> Visuals:
    """Images and frames, which may follow each other in any order, as one.

    raises  ValueError: placeholders that are no whole number of the images, or frames, of a row
    """
    if len(streams) == 1:
        return streams[0]
    asked = []
    for stream in streams:
        lengths = [len(image) for image in stream.features]
        tokens = torch.nonzero_static(stream.at.flatten(), size=sum(lengths))[:, 0]
        index = torch.tensor([0, *accumulate(lengths)][:-1], device=tokens.device)
        asked += [stream.at.sum(1), tokens[index]]
    known = torch.cat(asked).tolist()  # a wait for the device that one kind alone does without
    pairs: list[tuple[int, int]] = []  # stream and number, of what was encoded
    starts: list[int] = []
    for which, stream in enumerate(streams):
        rows, images = len(stream.at), len(stream.features)
        counts, first, known = known[:rows], known[rows : rows + images], known[rows + images :]
        own = images_of_rows(counts, [len(image) for image in stream.features])
        pairs += [(which, n) for n in originals(own, images // stream.seen.images)]
        starts += first
    order = sorted(range(len(starts)), key=starts.__getitem__)
    features = [image for stream in streams for image in stream.features]
    frames = [is_frame for stream in streams for is_frame in stream.is_frame]
    return Visuals(
        torch.stack([stream.at for stream in streams]).any(0),
        [features[i] for i in order],
        _joined([stream.seen for stream in streams], list(dict.fromkeys(pairs[i] for i in order))),
        [frames[i] for i in order],
    )


def _joined(seens: list[Seen], order: list[tuple[int, int]]) -> Seen:
    """What was seen of all, in this order of (which of them, number). Once: what is made of it is
    kept there, see Seen.reduced."""
    first, second = seens
    if first.joined is not None and first.joined[0] is second and first.joined[1] == order:
        return first.joined[2]

    def pick(name: str) -> list[Tensor] | None:
        of = [getattr(seen, name) for seen in seens]
        if any(known is None for known in of):
            return None
        return [of[which][number] for which, number in order]

    joined = Seen(len(order), pick("scores"), pick("metric"), pick("visual"))
    first.joined = second, order, joined
    return joined
