"""The hooks: learn of the images, shorten the sequence, tell attention what each key stands for."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from restore_ext import profiling
from restore_ext.hf.attention import CALIBRATED, STATE, Calibration, NamedConfig
from restore_ext.hf.cache import refuse_cache, restore_cache, restored
from restore_ext.hf.compat import encoder_inputs, encodes_before_forward, image_features
from restore_ext.hf.cut import Cut, cut_sequence, padding_mask
from restore_ext.hf.descent import Descent, Extent
from restore_ext.hf.families import Family
from restore_ext.hf.generation import drafted, in_chunks, watch_generation
from restore_ext.hf.images import images_of_rows, reduce_images, without_separators
from restore_ext.hf.parallel import keep_encoded
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.view import View, side_before
from restore_ext.hf.vision import VIDEO, Seen, is_recording, recording, remember
from restore_ext.hf.visuals import PIXELS, Visuals, in_prompt_order, kinds_of, remembered
from restore_ext.rope import rope_decays

if TYPE_CHECKING:
    from restore_ext.hf.handle import Handle

_TABLE_STEP = 1024


@dataclass
class Call:
    """One forward of the model, or of the inner model, on its way to the language model."""

    module: nn.Module
    outer: "Call | None"
    unfit: list[str]  # arguments that count tokens of the sequence as it was
    mask: Any = None  # the attention mask, before the inner model made one of pairs of it
    blocks: Tensor | None = None  # [B, L], see Family.blocks
    draft: int = 0  # tokens at the end that are no prompt
    # Of each kind of features that come with it: where they go, [B, S] bool; what they are, [N, C]
    # per image or frame, and what was seen beside them.
    places: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, tuple[list[Tensor], Seen]] = field(default_factory=dict)

    def visuals(self, device: torch.device) -> Visuals:
        """All that was found, as one."""
        return in_prompt_order(
            [
                Visuals(self.places[kind].to(device), *found, [kind == VIDEO] * len(found[0]))
                for kind, found in self.found.items()
            ]
        )


# Per thread and per task: the forward of one thread knows nothing of another's.
_CALL: ContextVar[Call | None] = ContextVar("restore_ext_call", default=None)


class Hooks:
    """All that attach() puts on a model."""

    def __init__(self, family: Family, handle: "Handle") -> None:
        self.family = family
        self.handle = handle
        self._encoded_once = encodes_before_forward(family.model)
        self._decays: list[Tensor | None] = []

    @property
    def settings(self) -> Settings:
        return self.handle.settings

    def install(self, patches: Patches) -> None:
        """What every method needs."""
        family = self.family
        keep_encoded(patches, family.model)
        patches.hook(family.model, "forward_pre_hook", self._before_model, with_kwargs=True)
        patches.hook(family.inner, "forward_pre_hook", self._before_inner, with_kwargs=True)
        for module in (family.model, family.inner):
            patches.hook(module, "forward_hook", self._after, always_call=True)
        patches.hook(family.lm, "forward_pre_hook", self._before_lm, with_kwargs=True)
        patches.hook(family.lm, "forward_hook", self._after_lm, with_kwargs=True)
        for kind in family.kinds:
            patches.set(family.inner, f"get_{kind}_features", self._watched_features(kind))
        for module in family.attentions:
            patches.set(module, "config", NamedConfig(module.config, CALIBRATED))
        watch_generation(patches, family.model, self._refuse_chunks)

    def install_method(self, patches: Patches, settings: Settings) -> None:
        """What is put on top for the method of these settings."""
        self.family.install(patches, settings)
        for index, layer in enumerate(self.family.lm.layers if settings.stages else ()):
            before = functools.partial(self._before_layer, index=index)
            patches.hook(layer, "forward_pre_hook", before, with_kwargs=True)

    def _watched_features(self, kind: str) -> Callable[..., Any]:
        """get_image_features() or get_video_features() that remembers, beside its result, what the
        method needs to know."""
        original = getattr(self.family.inner, f"get_{kind}_features")
        signature = inspect.signature(original)

        @torch.compiler.disable
        @functools.wraps(original)  # generate() asks for its signature
        def get_features(*args: Any, **kwargs: Any) -> Any:
            # Qwen3-VL's videos are encoded by its get_image_features().
            if not self.handle.enabled or is_recording():
                return original(*args, **kwargs)
            with recording(self.settings, kind) as record:
                output = original(*args, **kwargs)
            if image_features(output):
                inputs = signature.bind(*args, **kwargs).arguments
                features, seen = self.family.see(record, output, inputs)
                remember(output, seen)
                call = _CALL.get()
                if call is not None and kind in call.places:
                    call.found[kind] = features, seen
            return output

        return get_features

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        unfit = ["labels"] if kwargs.get("labels") is not None else []
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            unfit.append("logits_to_keep")
        input_ids = args[0] if args else kwargs.get("input_ids")
        draft = 0 if input_ids is None else drafted(input_ids.shape[1])
        _CALL.set(Call(model, _CALL.get(), unfit, draft=draft))

    def _before_inner(
        self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        outer = _CALL.get()
        call = Call(inner, outer, [], mask=kwargs.get("attention_mask"))
        # A generated token may be the image token: only a forward that brings images has any.
        if not in_chunks() and (kinds := self._kinds(kwargs)):
            if outer is not None:
                call.unfit, call.draft = outer.unfit, outer.draft
            call.blocks = self.family.blocks(kwargs)
            input_ids = args[0] if args else kwargs.get("input_ids")
            self._place(call, kinds, input_ids, kwargs.get("inputs_embeds"))
            self._recall(call, kwargs)
        _CALL.set(call)

    def _kinds(self, inputs: dict[str, Any]) -> list[str]:
        """Of the features that come with these inputs, and are to be reduced."""
        return kinds_of(self.family, inputs) if self.handle.enabled else []

    def _place(
        self, call: Call, kinds: list[str], input_ids: Tensor | None, embeds: Tensor | None
    ) -> None:
        for kind in kinds:
            call.places[kind] = self.family.placeholders(input_ids, embeds, kind)

    def _recall(self, call: Call, inputs: dict[str, Any]) -> None:
        """Finds what was encoded before the forward."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        for kind, at in call.places.items():
            if encoded.get(kind) is not None:
                found = remembered(encoded[kind], kind, at)
                call.found.update({} if found is None else {kind: found})

    def _refuse_chunks(self, input_ids: Tensor, inputs: dict[str, Any], size: int) -> None:
        """Raises if a prompt about to be cut into chunks has an image to reduce.

        It has to be known before the first chunk, which may bring a slice of the features (5.18 on)
        or no image at all. On a reduced cache images are no business of stock, whatever their size.
        """

        def refuse() -> None:
            raise NotImplementedError(
                "prefill_chunk_size must be None where images are reduced, which a chunk would cut "
                f"up, got {size}"
            )

        kinds = self._kinds(inputs)
        if not kinds:
            return
        self.handle.last = None
        cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        if restored(cache):
            refuse()
        if cache is not None and (mask is None or mask.shape[1] == input_ids.shape[1]):
            input_ids = input_ids[:, cache.get_seq_length() :]  # else these are the new ones alone
        call = Call(self.family.inner, None, [])
        self._place(call, kinds, input_ids, None)
        self._recall(call, inputs)
        self._encode(call, inputs)
        if not call.found:
            return
        visuals = call.visuals(input_ids.device)
        seen, lengths = visuals.seen, [len(image) for image in visuals.features]
        rows = images_of_rows(visuals.at.sum(1).tolist(), lengths)
        features, _ = without_separators(visuals.features, seen, rows, visuals.at)
        once = self._encoded_once
        reduce_images(features, seen, rows, self.settings, encoded_once=once, refuse=refuse)

    def _encode(self, call: Call, inputs: dict[str, Any]) -> None:
        """Finds what is still to be encoded, among the inputs of generate()."""
        # Learnt as in a forward: 4.57 returns bare tensors, with nothing to remember it by.
        token = _CALL.set(call)
        try:
            for kind in call.places:
                if inputs.get(PIXELS[kind]) is not None:
                    encode = getattr(self.family.inner, f"get_{kind}_features")
                    encode(**encoder_inputs(self.family.inner, kind, inputs))
        finally:
            _CALL.reset(token)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = _CALL.get()
        if call is not None and call.module is module:
            _CALL.set(call.outer)

    def _before_lm(
        self, lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Shortens what the language model is given; None, and so stock, if there is no need."""
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        call = _CALL.get()
        if call is not None and call.module is self.family.inner:
            kwargs = {**kwargs, "attention_mask": call.mask}
        if call is not None and not call.found:
            call = None
        if embeds is None or (call is None and not restored(cache)):
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        cut = None if call is None else self._cut(call, embeds, positions, kwargs)
        if cut is None and not restored(cache):
            return None
        return args, self._calibrated(call, cut, embeds, positions, kwargs)

    def _after_lm(
        self, lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        state = kwargs.get(STATE)
        if isinstance(state, Calibration) and len(state.seen) < state.descent.depth:
            raise RuntimeError(
                f"{type(lm).__name__} must hand its keyword arguments on to the attention of every "
                f"layer, got to layers {sorted(state.seen)} of {state.descent.depth}"
            )

    @torch.compiler.disable
    def _before_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, index: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        state = kwargs.get(STATE)
        if not isinstance(state, Calibration):
            return None
        return state.descent.enter(index, layer, args, kwargs)

    @torch.compiler.disable
    def _cut(
        self, call: Call, embeds: Tensor, positions: Tensor, kwargs: dict[str, Any]
    ) -> Cut | None:
        def refuse() -> None:
            for name in call.unfit:
                raise ValueError(
                    f"{name} cannot be used where images are reduced: the sequence gets shorter. "
                    "Use the logits; handle.last.source says which token each belongs to"
                )
            refuse_cache(kwargs.get("past_key_values"))
            padding_mask(mask, embeds)

        mask = kwargs.get("attention_mask")
        known = isinstance(mask, Tensor) and mask.dim() == 2  # else refused, if there is need
        self.handle.last = None
        return cut_sequence(
            call.visuals(embeds.device),
            self.settings,
            valid=padding_mask(mask if known else None, embeds),
            positions=positions,
            encoded_once=self._encoded_once,
            refuse=refuse,
        )

    @torch.compiler.disable
    @profiling.range("plan_keys")
    def _calibrated(
        self,
        call: Call | None,
        cut: Cut | None,
        embeds: Tensor,
        positions: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The language model's arguments for a sequence that is, or goes on from, a reduced one.

        call  the call that brought images, if any
        """
        kwargs, S = dict(kwargs), embeds.shape[1]
        valid = padding_mask(kwargs.get("attention_mask"), embeds)
        cache = self._restore_cache(positions, valid, kwargs)
        layers = restored(cache)
        view = View.of(None if cut is None else cut.plan, positions, valid, _blocks(call, valid))
        reach = S + (layers[0].reach if layers else 0) if cut is None else cut.reach
        draft = 0 if call is None else call.draft
        askers = {}
        if cut is not None:
            kwargs.update(self.family.shorten(kwargs, cut))
            logical = layers[0].logical if layers else 0
            self.handle.last = cut.report(self.family, embeds.dtype, layers, logical)
            kwargs["inputs_embeds"] = embeds = cut.plan.shorten(embeds, cut.tokens)
            askers = cut.askers(embeds, draft)

        everywhere = self.settings.decode_distance
        far = self.settings.distance and (everywhere or call is not None)
        layer_count = len(self.family.lm.layers)
        calibration = Calibration(
            backend=self.settings.backend,
            heads=self.family.heads,
            decays=self._decay_tables(reach, embeds.device) if far else [None] * layer_count,
            windows=self.family.windows,
            window_cuts_blocks=self.family.window_cuts_blocks,
            near=draft if far and not everywhere else 0,
        )
        descent = calibration.descent = Descent(
            self.family,
            self.settings,
            calibration,
            view,
            layers,
            Extent(S, reach, None if cut is None else cut.behind),
            () if cut is None else cut.stages,
            askers,
            self.handle.last if cut is not None else None,
        )
        kwargs[STATE] = calibration
        kwargs["position_ids"] = descent.positions
        # Of four dimensions: taken for a mask that is ready. Attention makes its own.
        kwargs["attention_mask"] = embeds.new_zeros(1, 1, 1, 1)
        kwargs["past_key_values"] = cache
        if kwargs.get("cache_position") is not None:  # 4.57
            kwargs["cache_position"] = kwargs["cache_position"][-embeds.shape[1] :]
        return kwargs

    def _restore_cache(self, positions: Tensor, valid: Tensor, kwargs: dict[str, Any]) -> Any:
        lm, cache, use = self.family.lm, kwargs.get("past_key_values"), kwargs.get("use_cache")
        use = lm.config.use_cache if use is None else use
        recomputes = lm.training and getattr(lm, "gradient_checkpointing", False)
        if cache is None and (not use or recomputes):
            return None

        def before(count: int) -> Any:
            mask, axes = kwargs.get("attention_mask"), self.family.axes
            return side_before(count, mask, positions, valid, axes, self.settings.distance)

        return restore_cache(cache, len(lm.layers), before, lm.config)

    def _decay_tables(self, reach: int, device: torch.device) -> list[Tensor | None]:
        decays = self._decays
        table = next((decay for decay in decays if decay is not None), None)
        outdated = table is not None and (table.shape[1] < reach or table.device != device)
        if not decays or outdated:
            length = -(-reach // _TABLE_STEP) * _TABLE_STEP
            tables = rope_decays(self.family.lm, length)
            moved = {id(table): table.to(device) for table in tables if table is not None}
            self._decays = decays = [moved.get(id(table)) for table in tables]
        return decays


def _blocks(call: Call | None, valid: Tensor) -> Tensor | None:
    """[B, S] the number of each token's block, see Family.blocks; valid [B, S]."""
    if call is None or call.blocks is None:
        return None
    S, number = valid.shape[1], call.blocks.to(valid.device)
    number = pad(number, (0, max(0, S - number.shape[1])), value=-1)[:, -S:]
    number[:, S - call.draft :] = -1  # of a draft stock takes the last token's
    return number.masked_fill(~valid, -1)
