"""prepare_inputs(): prompts shortened before generate(), for caches that attach() cannot serve."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.attention import NamedConfig
from restore_ext.hf.compat import GENERATE_CARRIES_POSITIONS, generation_positions
from restore_ext.hf.cut import Cut, cut_sequence
from restore_ext.hf.families import Family, find_family
from restore_ext.hf.patches import Patches
from restore_ext.hf.prompt import PREPARED, Prompt
from restore_ext.hf.report import Report
from restore_ext.hf.settings import (
    DEFAULT_LAYER0,
    DEFAULT_MIN_VISUAL_TOKENS,
    Settings,
    make_settings,
)
from restore_ext.hf.view import View
from restore_ext.hf.visuals import Visuals, encode
from restore_ext.reduce import DEFAULT_ANCHOR_MODE, DEFAULT_METHOD, DEFAULT_RETAIN
from restore_ext.rope import rope_decay


class PreparedInputs(Mapping[str, Tensor]):
    """Shortened prompts, for `with prepared: model.generate(**prepared, ...)`.

    Inside the `with` block the model's attention is calibrated for these prompts, and for no other:
    anything else it is given there raises RuntimeError. Outside, the model is as it was, and
    `**prepared` raises, for generate() would run uncalibrated. A model can be in one such block at
    a time, in one thread. The block may be entered again.

    input_ids       [B, S] as they came: generate() returns them with the answer
    inputs_embeds   [B, T, C], attention_mask [B, T], position_ids [B, T] or [4, B, T]
    report          what was reduced, as Handle.last; None if nothing had to be: then these are the
                    original inputs, and the `with` block does nothing
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        family: Family,
        prompt: Prompt | None,
        report: Report | None,
    ) -> None:
        self.report = report
        self._tensors = tensors
        self._family = family
        self._prompt = prompt
        self._patches = Patches()
        self._active = False

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        if self._prompt is not None and not self._active:
            raise RuntimeError(
                "prepared inputs must be used as `with prepared: model.generate(**prepared)`: "
                "outside the block attention is not calibrated"
            )
        return iter(self._tensors)

    def __enter__(self) -> "PreparedInputs":
        self._family.require_free()
        if self._prompt is not None:
            for module in self._family.attentions:
                config = NamedConfig(module.config, PREPARED, self._prompt)
                self._patches.set(module, "config", config)
        self._active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._active = False
        self._patches.undo()


@torch.no_grad()
def prepare_inputs(
    model: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
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
    **images: Tensor,
) -> PreparedInputs:
    """Reduces the visual tokens of prompts once, before generate(), and leaves the cache alone.

    For what attach() cannot do: static caches, decoding compiled with fullgraph=True, quantised and
    offloaded caches. It says what an attached model says::

        prepared = restore_ext.prepare_inputs(model, **inputs, method="vispruner", keep=64)
        with prepared:
            out = model.generate(**prepared, cache_implementation="static", max_new_tokens=32)

    generate() sizes a static cache of its own for original + shortened + new tokens; a
    StaticCache(max_cache_len=shortened + new) passed as past_key_values is smaller.

    model           as for attach(); it may be attached, and stays so
    input_ids       [B, S] int64, left padded
    attention_mask  [B, S]; no padding by default
    images          what else the processor returned: pixel_values, pixel_values_videos, ...
    others          the options of attach(), which explains them

    returns  PreparedInputs, to be used inside `with`
    raises   TypeError, ValueError, NotImplementedError: as attach(); with transformers older than
             5.3, whose generate() makes up positions of its own
    """
    if not GENERATE_CARRIES_POSITIONS:
        raise NotImplementedError(
            "prepare_inputs needs transformers >= 5.3, where generate() keeps the positions it is "
            "given; use attach()"
        )
    family = find_family(model)
    settings = make_settings(
        axes=family.axes,
        method=method,
        options=options,
        budget=budget,
        keep=keep,
        keep_ratio=keep_ratio,
        restore=restore,
        positions=positions,
        calibrate=calibrate,
        layer0=layer0,
        decode_distance=decode_distance,
        backend=backend,
        retain=retain,
        anchor_mode=anchor_mode,
        seed=seed,
        min_visual_tokens=min_visual_tokens,
    )
    known = inspect.signature(model.forward).parameters
    for name in images:
        if name not in known:
            raise TypeError(f"{name} is no argument of {type(model).__name__}")
    settings = family.fit(settings)
    family.require(settings)
    family.require_prepared(settings)

    given = {"input_ids": input_ids, "attention_mask": attention_mask, **images}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    visuals = encode(family, settings, tensors, input_ids)
    if visuals is not None:
        cut, position_ids, embeds = _cut(family, settings, visuals, tensors)
        if cut is not None:
            return _prepared(family, settings, cut, position_ids, embeds, tensors)
    return PreparedInputs(tensors, family, None, None)


def _cut(
    family: Family, settings: Settings, visuals: Visuals, tensors: dict[str, Tensor]
) -> tuple[Cut | None, Tensor, Tensor]:
    """The cut, if there is one, the positions, and the embeddings with the images' features."""
    input_ids = tensors["input_ids"]
    mask = tensors.get("attention_mask", torch.ones_like(input_ids))
    others = {n: x for n, x in tensors.items() if n not in ("input_ids", "attention_mask")}
    position_ids = generation_positions(family.model, input_ids, {"attention_mask": mask, **others})
    embeds = family.model.get_input_embeddings()(input_ids)
    cut = cut_sequence(
        visuals,
        settings,
        valid=mask.bool(),
        positions=position_ids,
        encoded_once=True,
        refuse=lambda: None,
    )
    features = torch.cat(visuals.features).to(embeds)
    return cut, position_ids, embeds.masked_scatter(visuals.at[..., None], features)


def _prepared(
    family: Family,
    settings: Settings,
    cut: Cut,
    position_ids: Tensor,
    embeds: Tensor,
    tensors: dict[str, Tensor],
) -> PreparedInputs:
    plan, input_ids = cut.plan, tensors["input_ids"]
    valid = tensors.get("attention_mask", torch.ones_like(input_ids)).bool()
    view = View.of(plan, position_ids, valid)
    others = view.side(settings, family.axes, None, layer=1)
    uniform = settings.layer0 == "uniform"
    first = view.side(settings, family.axes, None, layer=0) if uniform else others
    decay = later = None
    if settings.distance:
        # Generated tokens go on to where the model ends; a compiled step cannot grow a table.
        far = family.lm.config.max_position_embeddings if settings.decode_distance else 0
        decay = rope_decay(family.lm, max(cut.reach, far))
        decay = None if decay is None else decay.to(embeds.device)
        later = decay if settings.decode_distance else None
    short = {
        "input_ids": input_ids,
        "inputs_embeds": plan.shorten(embeds, cut.tokens),
        "attention_mask": plan.valid.long(),
        "position_ids": view.counted(settings, None),
    }
    prompt = Prompt(settings.backend, first, others, decay, later)
    return PreparedInputs(short, family, prompt, cut.report(family, embeds.dtype, [], 0))
