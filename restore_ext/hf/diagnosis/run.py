"""diagnose(): what a reduction does to attention, to the states and to what the model says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import LogitsProcessor, LogitsProcessorList

from restore_ext import checks
from restore_ext.hf.attention import MASK_NEEDS
from restore_ext.hf.diagnosis.layout import Layout, read_layout
from restore_ext.hf.diagnosis.probe import MAPPED, Probe
from restore_ext.hf.diagnosis.result import Diagnosis, Run, Way
from restore_ext.hf.families import Family, find_family
from restore_ext.hf.handle import Handle, attach, handle_of
from restore_ext.hf.patches import Patches
from restore_ext.hf.report import Report
from restore_ext.hf.settings import Settings
from restore_ext.hf.visuals import kinds_of, pixels_of
from restore_ext.methods import find_card
from restore_ext.reduce import DEFAULT_METHOD
from restore_ext.reduction import Reduction
from restore_ext.stages import read_schedule

DEFAULT_NEW_TOKENS = 8
_PLAIN = {"restore": False, "calibrate": "none"}
WAYS: dict[str, dict[str, Any]] = {
    "reindexed": {**_PLAIN, "positions": "reindex"},
    "original": {**_PLAIN, "positions": "original"},
    "restore": {"restore": True},
}


@torch.no_grad()
def diagnose(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    **reduction: Any,
) -> Diagnosis:
    """Compares a reduced model with the full one, layer by layer and word by word.

    The full model answers greedily; then, for each way of reducing, the same prompt goes through
    the attached model, which is made to say the same words. On the way are measured: the share of
    attention on visual tokens in every layer (after figure 2 of RESTORE, 2606.01711), for visual
    queries, for the text behind the image and for the last token, of the logits as calibrated; the
    states behind the last norm; the distribution of every next word.

        reindexed   the plain method, positions counted anew
        original    the same tokens at their original positions, no calibration
        restore     merged, at original positions, calibrated

    A kept token's state is compared with its own in the full run, a merged one's with the mean of
    its members'. What a method inside the language model leaves is followed from layer to layer.

    model       as for attach(), and not attached: it comes back as it was. Its attention must be
                sdpa or eager
    inputs      what a processor returns for B prompts, left padded, an image or a video in
                every row
    new_tokens  how many tokens to decode at most, 1 or more; an answer may end before
    reduction   the options of attach(), which explains them: method, keep, options, schedule,
                backend, layer0, ...; `calibrate` is that of the way "restore"; not restore,
                positions and enabled, which the ways differ in

    returns  Diagnosis. A way that the model or the method cannot go is in its `left_out`
    raises   TypeError, ValueError, NotImplementedError: as attach(), before any work is done; for
             inputs without an image in every row, or padded on the right; for another attention.
             RuntimeError: attached already
    """
    family = find_family(model)
    if handle_of(model) is not None:
        raise RuntimeError("model must not be attached: detach it first")
    checks.require_count("new_tokens", new_tokens)
    _require_inputs(family, inputs)
    for given in ("restore", "positions", "enabled"):
        if given in reduction:
            raise TypeError(f"{given} must not be given: it is what the ways differ in")
    attention = family.lm.config._attn_implementation
    if attention not in MASK_NEEDS:
        raise ValueError(
            f"model must have the attention implementation {' or '.join(MASK_NEEDS)} to be "
            f"measured, got {attention!r}; call model.set_attn_implementation('sdpa')"
        )
    ways, left_out, settings = _possible_ways(family, reduction)
    layout = read_layout(family, settings, inputs)
    trial = _Trial(family, inputs, layout, settings.backend, new_tokens)
    full = trial.run(None, None)
    answer, ends = full.answer, _after_end(full.answer, model.generation_config.eos_token_id)
    found: dict[str, Way] = {}
    for name, options in ways.items():
        with attach(model, **options) as handle:
            found[name] = _compared(layout, trial.run(handle, answer), full, ends)
    asked = {name: _plain(value) for name, value in reduction.items()}
    return Diagnosis(full.run, found, left_out, layout.images, answer.cpu(), asked)


def _require_inputs(family: Family, inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be what a processor returns, got {type(inputs).__name__}")
    if inputs.get("input_ids") is None:
        raise ValueError(f"inputs must have input_ids, got {sorted(inputs)}")
    if not kinds_of(family, inputs):
        raise ValueError(f"inputs must have {pixels_of(family)}, got {sorted(inputs)}")


def _possible_ways(
    family: Family, reduction: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, str], Settings]:
    """What attach() is to be given for each way, and why others are left out, all tried on; and
    settings that reduce nothing."""
    ways: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name, how in WAYS.items():
        options = {**reduction, **how}
        if name == "restore" and "calibrate" in reduction:
            options["calibrate"] = reduction["calibrate"]
        if name == "reindexed" and family.axes > 1:
            left_out[name] = "M-RoPE keeps the positions of its tokens, whatever is reduced"
            continue
        try:
            with attach(family.model, **options) as handle:
                settings = handle.settings
        except NotImplementedError as error:
            if name != "reindexed":  # a model that nothing can be done with says so next
                raise
            left_out[name] = str(error)
            continue
        if name == "restore" and not _restores(reduction):
            left_out[name] = "RESTORE has nothing to add to this method"
            continue
        ways[name] = options
    return ways, left_out, replace(settings, method=None, options={}, stages=())


def _restores(reduction: dict[str, Any]) -> bool:
    """Whether RESTORE has anything to add to a method that attach() has accepted."""
    method, schedule = reduction.get("method", DEFAULT_METHOD), reduction.get("schedule")
    if schedule is not None and reduction.get("keep") is reduction.get("keep_ratio") is None:
        method = read_schedule(schedule)["method"]
    return find_card(method).restores


def _after_end(answer: Tensor, end: int | list[int] | None) -> Tensor:
    """[B, n] bool, what is padding behind the end of an answer [B, n]."""
    ends = torch.tensor([] if end is None else end, dtype=answer.dtype, device=answer.device)
    ended = torch.isin(answer, ends)
    return (ended.cumsum(1) - ended.long()) > 0


@dataclass(frozen=True)
class _Heard:
    """What one run gave."""

    run: Run
    answer: Tensor  # [B, n] int64
    logits: Tensor  # [B, n, V]
    states: Tensor  # [B, T, C] float32, on the CPU
    assign: Tensor  # [B, S] int64, which of these T each token of the prompt is in
    is_visual: Tensor  # [B, T] bool
    report: Report | None


@dataclass(frozen=True)
class _Trial:
    """The prompts, which are run again and again."""

    family: Family
    inputs: Mapping[str, Any]
    layout: Layout
    backend: str
    new_tokens: int

    def run(self, handle: Handle | None, answer: Tensor | None) -> _Heard:
        """Generates greedily, or says `answer`, with the model as it is attached to by `handle`."""
        patches, forced = Patches(), LogitsProcessorList()
        if answer is not None:
            forced.append(_Say(answer, self.inputs["input_ids"].shape[1]))
        probe = Probe(
            self.family,
            self.layout,
            self.backend,
            lambda: None if handle is None else handle.last,
        )
        try:
            probe.install(patches)
            out = self.family.model.generate(
                **self.inputs,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                max_new_tokens=self.new_tokens,
                logits_processor=forced,
                return_dict_in_generate=True,
                output_logits=True,
                use_cache=True,
            )
        finally:
            patches.undo()
        assert probe.states is not None
        share = {name: torch.stack(layers, 1) for name, layers in probe.share.items()}
        attention = {name: self._of_images(probe.spread[name]) for name in MAPPED}
        return _Heard(
            Run(torch.stack(probe.tokens, 1), share, attention),
            out.sequences[:, self.inputs["input_ids"].shape[1] :],
            torch.stack(out.logits, 1),
            probe.states,
            probe.assign,
            probe.kinds(probe.states.shape[1])["visual"],
            None if handle is None else handle.last,
        )

    def _of_images(self, layers: list[Tensor]) -> list[Tensor]:
        """[L, N] for each image, from [B, S] of each layer."""
        spread = torch.stack(layers)
        return [spread[:, image.row, image.index] for image in self.layout.images]


class _Say(LogitsProcessor):
    """Makes generate() say given words; the logits that it returns are raw."""

    def __init__(self, answer: Tensor, prompt: int) -> None:
        self._answer, self._prompt = answer, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        word = self._answer[:, input_ids.shape[1] - self._prompt]
        return torch.full_like(scores, float("-inf")).scatter(1, word[:, None], 0.0)


def _compared(layout: Layout, heard: _Heard, full: _Heard, behind_end: Tensor) -> Way:
    want, got = (x.logits.double().log_softmax(-1) for x in (full, heard))
    ratio = torch.where(want.isneginf(), 0, want - got)  # what is never said diverges by nothing
    divergence = (want.exp() * ratio).sum(-1)
    agreement = (want.argmax(-1) == got.argmax(-1)).double()
    return Way(
        heard.run.tokens,
        heard.run.share,
        heard.run.attention,
        reductions=_reductions(layout, heard),
        cosine=_cosines(heard, full),
        divergence=divergence.masked_fill(behind_end, torch.nan).cpu(),
        agreement=agreement.masked_fill(behind_end, torch.nan).cpu(),
    )


def _cosines(heard: _Heard, full: _Heard) -> dict[str, Tensor]:
    states, assign = heard.states.double(), heard.assign
    B, T, C = states.shape
    column = torch.where(assign < 0, T, assign)
    members = torch.zeros(B, T + 1, dtype=torch.float64)
    members = members.scatter_add(1, column, torch.ones_like(members[:, :1]).expand_as(column))
    want = torch.zeros(B, T + 1, C, dtype=torch.float64)
    want = want.scatter_add(1, column[..., None].expand(-1, -1, C), full.states.double())
    cosine = cosine_similarity(states, want[:, :T] / members[:, :T, None].clamp(min=1), dim=-1)
    kept = heard.is_visual & (members[:, :T] == 1)
    kinds = {"visual": heard.is_visual, "kept": kept, "merged": heard.is_visual & ~kept}
    means = {name: cosine.where(of, torch.nan).nanmean(1) for name, of in kinds.items()}
    return {**means, "last": cosine[:, -1]}


def _reductions(layout: Layout, heard: _Heard) -> list[Reduction]:
    """What became of each image's tokens, cuts included."""
    reductions = []
    for number, image in enumerate(layout.images):
        column = heard.assign[image.row, image.index]
        left = column[column >= 0].unique()
        of = left[:, None] == column  # [M, N]
        kept = of.sum(1) == 1
        if heard.report is not None:  # a cluster of one is none that the method kept
            first = heard.report.images[number].reduction
            untouched = first.kept.cpu().gather(1, first.group.cpu().clamp(min=0))
            kept &= (of & untouched).any(1)
        group = torch.where(of.any(0), torch.searchsorted(left, column), -1)[None]
        nothing, ones = torch.zeros(1, len(column), 1), torch.ones(1, len(column))
        reductions.append(Reduction.of_groups(nothing, group, len(left), ones, kept[None]))
    return reductions


def _plain(value: Any) -> Any:
    """An option as JSON has it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
