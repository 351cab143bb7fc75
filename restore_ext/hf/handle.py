"""attach(): a model that reduces the visual tokens of every prompt by itself, until detached."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from restore_ext import checks
from restore_ext.hf.families import Family, find_family
from restore_ext.hf.hooks import Hooks
from restore_ext.hf.patches import Patches
from restore_ext.hf.report import Report
from restore_ext.hf.settings import (
    DEFAULT_LAYER0,
    DEFAULT_MIN_VISUAL_TOKENS,
    Settings,
    make_settings,
)
from restore_ext.reduce import DEFAULT_ANCHOR_MODE, DEFAULT_METHOD, DEFAULT_RETAIN

_HANDLE = "_restore_ext_handle"


class Handle:
    """What attach() returns: switches it off and on, undoes it, says what it did.

    options  those of attach() by name, as it got them
    settings what they came to, or what switch() got since
    enabled  False: every new prompt takes the stock path. A conversation whose prompt was reduced
             goes on with what is in its cache.
    last     a Report of the last prompt that was reduced; None before the first, and after a prompt
             whose images were all within their budgets, or too few
    """

    def __init__(
        self, family: Family, settings: Settings, options: Mapping[str, Any], enabled: bool
    ) -> None:
        self.settings = settings
        self.enabled = enabled
        self.last: Report | None = None
        self.options = dict(options)
        self._family = family
        self._backend = settings.backend  # that of the options, or what the model can have
        self._patches = Patches()
        self._method = Patches()  # on top of the others
        self._hooks = Hooks(family, self)
        self._hooks.install(self._patches)
        self._hooks.install_method(self._method, settings)
        self._patches.set(family.model, _HANDLE, self)

    def variant(self, **changes: Any) -> Settings:
        """Other settings for switch(): options of attach() by name, the rest as attach() got them.

        The model is only looked at, so this may run beside a forward.

        raises  TypeError, ValueError: as attach(), but for what only switch() can find out
        """
        if unknown := changes.keys() - self.options.keys():
            raise TypeError(
                f"changes must be options of attach(): {', '.join(self.options)}; got "
                f"{', '.join(sorted(unknown))}"
            )
        settings = _settings(self._family, {**self.options, **changes})
        if "backend" in changes:
            return self._family.fit(settings)
        return dataclasses.replace(settings, backend=self._backend)

    def switch(self, settings: Settings) -> None:
        """Goes on with what variant() gave: as attach() anew, but much faster, for what the methods
        have in common stays on the model. Between forwards, and between conversations.

        raises  TypeError, ValueError, NotImplementedError: as attach(); nothing has changed then.
                RuntimeError: detached
        """
        if handle_of(self._family.model) is not self:
            raise RuntimeError("the model must be attached by this handle, which was detached")
        if settings == self.settings:
            return
        self._family.require_language_model(settings)
        self._method.undo()
        try:
            self._hooks.install_method(self._method, settings)
        except BaseException:
            self._method.undo()
            self._hooks.install_method(self._method, self.settings)
            raise
        self.settings = settings

    def detach(self) -> None:
        """Undoes attach(); the model is what it was. Twice is once."""
        if handle_of(self._family.model) is self:
            self._family.require_free()
            self._method.undo()
            self._patches.undo()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach(
    model: Any,
    *,
    method: str = DEFAULT_METHOD,
    options: Mapping[str, Any] | None = None,
    keep: int | Sequence[int] | Tensor | None = None,
    keep_ratio: float | None = None,
    budget: str = "per_image",
    restore: bool = True,
    positions: str | None = None,
    calibrate: str | None = None,
    layer0: str = DEFAULT_LAYER0,
    decode_distance: bool = False,
    backend: str = "op",
    retain: float = DEFAULT_RETAIN,
    anchor_mode: str = DEFAULT_ANCHOR_MODE,
    seed: int = 0,
    min_visual_tokens: int = DEFAULT_MIN_VISUAL_TOKENS,
    schedule: Mapping[str, Any] | str | Path | None = None,
    enabled: bool = True,
) -> Handle:
    """Makes a transformers model reduce the visual tokens of its prompts (RESTORE, 2606.01711).

    After that, forward(), generate() (greedy, sampling, beams, assisted decoding, later turns on
    the cache it returned), pipelines and serving run as ever, on fewer tokens. Only this instance
    is touched, by hooks; its copies and saved files are those of a stock model. Where nothing is to
    be reduced (text alone, images within their budgets, not enabled) the stock path runs, with the
    same bits. Attaching again replaces. Threads may share an attached model.

    model       of one of the classes in docs/families.md, whose names are in list_families()
    method      the base method, see docs/methods.md. What some need beyond the features (scores,
                keys) is read off the vision tower as it runs. Or one that cuts inside the language
                model: fastv, pyramiddrop, sparsevlm, vtw, adsc_style, schedule; see docs/inside.md
    options     the method's own, as a dict, see reduce_tokens and restore_ext.stages
    schedule    cuts inside the language model, behind the method's if a budget is given for that: a
                dict or the path of a JSON file, {"layers": [what each layer keeps], ...} or
                {"method": "fastv", "keep": 64, ...}; see restore_ext.stages.read_schedule
    keep        tokens to keep of an image, or of a frame of a video: an int, or one per image and
                frame, in the order of the prompts
    keep_ratio  instead of keep: a share in (0, 1]
    budget      "per_image", or "shared": keep and keep_ratio are of all the images and frames of a
                row (a prompt) together, which split it in proportion to their tokens, at least one
                each
    restore     True: merge what the method would drop, keep positions, calibrate; inside the
                language model: keep positions, and calibrate what is left. False: the plain
                method, which prunes, re-indexes (inside the language model: if it is published so)
                and does not calibrate. The next two override.
    positions   "original": every token left keeps the position of its source. "reindex": they are
                counted anew, and generated tokens follow on; not with M-RoPE, which keeps them
    calibrate   what is added to the logits of a key: "size", the log of how many tokens it stands
                for; "size+distance", for queries of the prompt also log(2 - decay of RoPE), Eq. 4
                (in rows where something was reduced); "none"
    layer0      "uniform": in layer 0 every visual token counts N / n; "size": its own size
    decode_distance  the distance term for generated tokens too; the released code has it for the
                prompt alone
    backend     "op": attention is ops.calibrated_attention. "mask": the model's own sdpa or eager
                attention with an additive mask; slower, and differentiable. Where the op cannot
                serve the model (its dtype or head size, a GPU without kernels) "op" becomes "mask",
                with a warning that says why
    retain, anchor_mode, seed  see reduce_tokens
    min_visual_tokens  a prompt (a row) with fewer visual tokens than that, in all its images
                together, is left as it is, wherever the method acts: on few tokens a reduction
                takes longer than it saves (docs/bench.md measures where). For `downsample` and
                `tome_vit`, whose tower sees no prompts: a picture with fewer. 0: none is
    enabled     see Handle

    returns     a Handle, also usable in a `with` statement
    raises      TypeError, ValueError, NotImplementedError: naming the argument, what was wanted and
                what came. The same from a later forward that cannot be done on a shorter sequence:
                `labels` (use the logits and handle.last.source), a static, quantised or offloaded
                cache (use prepare_inputs), prefill_chunk_size, continuous batching.

    Without a cache every step is a prompt, so the distance term reaches generated tokens too.
    Separators and newlines between image tokens are text. Tiles count as images where the model is
    handed them as such (InternVL, Idefics3, SmolVLM, Aya Vision), and every frame of a video does:
    where the tower makes one frame of two pictures (Qwen-VL, GLM-4V), the two are one.
    """
    family = find_family(model)
    given = {
        "method": method,
        "options": options,
        "budget": budget,
        "keep": keep,
        "keep_ratio": keep_ratio,
        "restore": restore,
        "positions": positions,
        "calibrate": calibrate,
        "layer0": layer0,
        "decode_distance": decode_distance,
        "backend": backend,
        "retain": retain,
        "anchor_mode": anchor_mode,
        "seed": seed,
        "min_visual_tokens": min_visual_tokens,
        "schedule": schedule,
    }
    settings = _settings(family, given)
    checks.require_flag("enabled", enabled)
    settings = family.fit(settings)
    family.require(settings)
    before = handle_of(model)
    if before is not None:
        before.detach()
    return Handle(family, settings, given, enabled)


def _settings(family: Family, options: Mapping[str, Any]) -> Settings:
    return make_settings(axes=family.axes, depth=len(family.lm.layers), **options)


def handle_of(model: Any) -> Handle | None:
    """What attach() returned for a model that is attached."""
    return model.__dict__.get(_HANDLE)
