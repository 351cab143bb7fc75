"""What attention does with the visual tokens, seen while a prompt goes through the layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from restore_ext.hf.attention import STATE, Calibration, Glance, NamedConfig, calibrated
from restore_ext.hf.diagnosis.layout import Layout
from restore_ext.hf.families import Family
from restore_ext.hf.patches import Patches
from restore_ext.hf.report import Report
from restore_ext.hf.scores import Asked
from restore_ext.hf.tower_scores import allowed

PROBED = "restore_ext_probed"
QUERIES = ("visual", "text", "last")  # whose attention is looked at
MAPPED = ("text", "last")  # of these also where it falls


class Probe:
    """Sees the first forward of a language model, attached or not: the prompt.

    What is measured are the logits that attention has: stock's with its mask, or the calibrated
    ones with what the Calibration says of every key. No attention matrix is kept, see row_scores.

    backend  "op": measured by ops.row_scores; "mask": by its reference
    report   what the attached model says of the prompt so far, its cuts included
    """

    def __init__(
        self, family: Family, layout: Layout, backend: str, report: Callable[[], Report | None]
    ) -> None:
        self._family, self._layout, self._backend = family, layout, backend
        self._report = report
        self._assigned: tuple[int, Tensor] | None = None
        self._ranges: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._heads = family.heads
        self.share: dict[str, list[Tensor]] = {name: [] for name in QUERIES}  # [B] float64 a layer
        self.spread: dict[str, list[Tensor]] = {name: [] for name in MAPPED}  # [B, S] float32
        self.tokens: list[Tensor] = []  # [B] int64, visual ones in each layer
        self.states: Tensor | None = None  # [B, T, C] float32, behind the last norm

    def install(self, patches: Patches) -> None:
        for module in self._family.attentions:
            patches.set(module, "config", NamedConfig(module.config, PROBED, self))
        patches.hook(self._family.lm, "forward_hook", self._after_lm)

    @property
    def assign(self) -> Tensor:
        """[B, S] int64, on the CPU: the token of the last layer seen that each token of the prompt
        is in; -1 dropped, or padding where something was reduced."""
        report = self._report()
        made = -1 if report is None else len(report.stages)
        if self._assigned is None or self._assigned[0] != made:
            self._assigned = made, self._chained(report)
        return self._assigned[1]

    def _chained(self, report: Report | None) -> Tensor:
        if report is None:
            valid = self._layout.valid.cpu()
            return torch.where(valid, torch.arange(valid.shape[1]), -1)
        assign = report.plan.assign.cpu()
        for stage in report.stages:
            later = stage.plan.assign.cpu().gather(1, assign.clamp(min=0))
            assign = torch.where(assign < 0, -1, later)
        return assign

    def kinds(self, T: int) -> dict[str, Tensor]:
        """[B, T] bool, on the CPU, which tokens of the last layer seen are of which kind."""
        report, layout = self._report(), self._layout
        is_visual, behind = layout.is_visual.cpu(), layout.behind.cpu()
        if report is not None:
            source = report.source.cpu()
            standing = self.assign.gather(1, source) == torch.arange(T)  # padding stands nowhere
            is_visual = is_visual.gather(1, source) & standing
            behind = behind.gather(1, source)
        last = (torch.arange(T) == T - 1).expand_as(is_visual)
        return dict(zip(QUERIES, (is_visual, behind, last), strict=True))

    def see(self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: Any) -> None:
        """Notes what the queries [B, Hq, T, D] of a layer do with the keys [B, Hkv, K, D]."""
        layer: int = module.layer_idx
        if self.states is not None:
            return
        if layer != len(self.tokens):
            raise RuntimeError(f"layers must run once and in order, got {layer} at a prompt")
        T, state = query.shape[2], kwargs.get(STATE)
        if isinstance(state, Calibration):
            arguments = state.arguments(layer, 0, T, T)
        else:
            arguments = {"causal": False, "key_range": self._stock_range(module, mask, kwargs, T)}
        key, kinds = key[:, :, :T], self.kinds(T)
        self.tokens.append(kinds["visual"].sum(1))
        for name, rows in kinds.items():
            count = rows.sum(1, keepdim=True)
            weight = (rows / count.clamp(min=1)).float().to(query.device)
            scores = Asked(T, 0, weight).scores(query, key, arguments, kwargs, self._backend)
            scores = self._heads.mean(scores, query.shape[1]).cpu()
            share = scores.double().where(kinds["visual"], 0).sum(1)
            self.share[name].append(share.where(count[:, 0] > 0, torch.nan))
            if name in MAPPED:
                self.spread[name].append(self._to_members(scores))

    def _to_members(self, scores: Tensor) -> Tensor:
        """[B, S]: what a token [B, T] gets, in equal parts to the tokens of the prompt in it."""
        assign, T = self.assign, scores.shape[1]
        column = torch.where(assign < 0, T, assign)
        ones = torch.ones_like(column, dtype=torch.float32)
        members = scores.new_zeros(len(scores), T + 1).scatter_add(1, column, ones)
        return (pad(scores, (0, 1)) / members.clamp(min=1)).gather(1, column)

    def _stock_range(self, module: Any, mask: Tensor | None, kwargs: Any, T: int) -> Tensor:
        """[B, T, 2] int32, the first and past-last key that stock shows to every query."""
        if id(mask) not in self._ranges:  # layers share masks; the reference keeps an id its own
            self._ranges[id(mask)] = mask, self._read_range(module, mask, kwargs, T)
        return self._ranges[id(mask)][1]

    def _read_range(self, module: Any, mask: Tensor | None, kwargs: Any, T: int) -> Tensor:
        valid = self._layout.valid
        if mask is None:  # as sdpa takes it
            said = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if said is None else said
            seen = torch.ones(1, T, T, dtype=torch.bool, device=valid.device)
            seen = seen.tril() if causal else seen
        else:
            seen = allowed(mask)[:, 0, :, :T].to(valid.device)
        seen = seen.expand(len(valid), T, T)
        first = seen.int().argmax(-1)
        past = torch.where(seen.any(-1), T - seen.flip(-1).int().argmax(-1), first)
        if ((past - first != seen.sum(-1)) & valid).any():
            raise NotImplementedError(
                "the keys that a token sees must be neighbours to be measured, got a mask with gaps"
            )
        return torch.stack([first, past], -1).int()

    def _after_lm(self, lm: nn.Module, args: Any, output: Any) -> None:
        if self.states is None:
            hidden = getattr(output, "last_hidden_state", None)
            hidden = output[0] if hidden is None else hidden
            self.states = hidden.detach().float().cpu()


def probed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The registered attention of a probed module: the one it has, after a look."""
    if not isinstance(kwargs.get(STATE), Glance):
        module.config.state.see(module, query, key, attention_mask, kwargs)
    return calibrated(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(PROBED, probed)
