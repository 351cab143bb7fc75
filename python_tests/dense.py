"""What a hooked model of any family must say, by its own layers: no cache, no hook of ours.

As naive.py, but the layers are the model's, in float64 (quantised ones as they are) with eager
attention, and run once over the prompt and its answer. Everything between them is recomputed:
merged features, positions, who sees whom (from the mask that stock made for all tokens), sizes and
distances, as one dense bias a layer. From a report it takes only the plan.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from naive import Setting
from torch import Tensor

VISUAL = ("visual_pos_masks", "deepstack_visual_embeds")


@dataclass
class Prompt:
    """One row as the language model gets it."""

    embeds: Tensor  # [S, C]
    position: Tensor  # [G, S]
    visual: Tensor | None = None  # [S] bool, tokens that get features in early layers too
    added: list[Tensor] = field(default_factory=list)  # [S, C] per early layer, 0 at other tokens
    allowed: list[Tensor] = field(default_factory=list)  # [S, S] bool, per layer


@dataclass
class Now:
    """The sequence as some layer has it."""

    source: Tensor  # [T] which of the prompt's tokens are left
    position: Tensor  # [G, T + new]
    size: Tensor  # [T + new]
    reduced: bool

    def cut(self, cut, x: Tensor, reindex: bool) -> tuple[Tensor, list[int]]:
        T, L = len(self.source), len(self.size)
        tail = list(range(T, L))
        members, left = [*cut.members, *([i] for i in tail)], [*cut.source, *tail]
        weight = [self.size[m] / self.size[m].sum() for m in members]
        x = torch.stack([w.to(x) @ x[0, m] for w, m in zip(weight, members, strict=True)])[None]
        self.size = torch.stack([self.size[m].sum() for m in members])
        self.source, self.position = self.source[cut.source], self.position[:, left]
        if reindex:
            self.position = self.position[:, :1] + torch.arange(len(left))
        self.reduced = True
        return x, left


class Dense:
    """A model, and its language model's decoder layers with their attention masks replaced."""

    def __init__(self, model, lm_name: str = "language_model", dtype: torch.dtype = torch.float64):
        """dtype  to compute in; that of the model leaves it as it is, as quantised layers have to
        be"""
        self.model = copy.deepcopy(model)
        if dtype != model.dtype:
            self.model.to(dtype)
        self.dtype = dtype
        self.model.set_attn_implementation("eager")
        self.inner = self.model.model
        self.lm = getattr(self.inner, lm_name)

    @torch.no_grad()
    def prompt(self, inputs: dict) -> Prompt:
        """One unpadded row, as stock sees it before any reduction."""
        seen: dict = {}
        allowed: list[Tensor] = []
        hooks = [
            self.lm.register_forward_pre_hook(
                lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
            )
        ]
        S = inputs["input_ids"].shape[1]

        def note(_, args, kwargs):
            allowed.append(_allowed(kwargs["attention_mask"], S))

        hooks += [x.register_forward_pre_hook(note, with_kwargs=True) for x in self.lm.layers]
        given = {n: x.to(self.dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        self.model(**given, use_cache=False)
        for hook in hooks:
            hook.remove()
        position = seen.get("position_ids")
        position = torch.arange(S)[None] if position is None else position
        position = position[-3:, 0] if position.dim() == 3 else position
        prompt = Prompt(seen["inputs_embeds"][0], position, allowed=allowed)
        if seen.get(VISUAL[0]) is not None:
            prompt.visual = seen[VISUAL[0]][0]
            for features in seen[VISUAL[1]]:
                full = torch.zeros_like(prompt.embeds)
                full[prompt.visual] = features
                prompt.added.append(full)
        return prompt

    @torch.no_grad()
    def logits(
        self, full: Prompt, plan, row: int, generated: list[int], setting: Setting, cuts=()
    ) -> Tensor:
        """[len(generated), V]: what predicts each of the generated tokens, the prompt reduced by a
        row of a plan, and then by the cuts (naive_stages.Cut) of that row."""
        padding = plan.assign.shape[1] - len(full.embeds)
        assign = plan.assign[row, padding:]
        columns = plan.valid[row].nonzero().flatten().tolist()
        members = [(assign == column).nonzero().flatten() for column in columns]
        source = plan.source[row, columns] - padding
        reduced = len(columns) < len(full.embeds)
        T, new = len(columns), len(generated) - 1

        position = full.position[:, source]
        if setting.reindex:
            position = full.position[:, :1] + torch.arange(T)
        following = (position if setting.reindex else full.position).max() + 1
        later = (following + torch.arange(new)).expand(len(position), -1)
        position = torch.cat([position, later], 1)

        ids = torch.tensor(generated[:-1], dtype=torch.long)
        answer = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([torch.stack([full.embeds[m].mean(0) for m in members]), answer])
        visual, added = full.visual, []
        if visual is not None:
            nothing = torch.zeros_like(answer)
            visual = torch.cat([visual[source], torch.zeros(new, dtype=torch.bool)])
            added = [
                torch.cat([torch.stack([x[m].mean(0) for m in members]), nothing])[visual]
                for x in full.added
            ]

        size = torch.tensor([float(len(m)) for m in members] + [1.0] * new).double()
        uniform = torch.cat([plan.uniform[row, columns], torch.ones(new)]).double()
        now = Now(source, position, size, reduced)

        def bias(layer: int, cos: Tensor, sin: Tensor) -> Tensor:
            L = len(now.size)
            distant = torch.full((L,), setting.distance and now.reduced)
            distant[L - new :] &= setting.decode_distance
            total = torch.zeros(L, L, dtype=torch.float64)
            if setting.size:
                total += (uniform if layer == 0 and setting.uniform_first else now.size).log()
            cosine = (cos @ cos.T + sin @ sin.T) / cos.shape[-1]
            total += torch.where(distant[:, None], (2 - cosine).log(), 0)
            prompt = [sees[now.source][:, now.source] for sees in full.allowed]
            sees = self._sees(layer, now.position, prompt, setting.reindex)
            return total.masked_fill(~sees, torch.finfo(total.dtype).min)

        def shorten(layer: int, x: Tensor) -> tuple[Tensor, list[int] | None]:
            for cut in cuts:
                if cut.layer == layer and len(cut.members) < len(now.source):
                    return now.cut(cut, x, setting.reindex)
            return x, None

        anew = (lambda: now.position) if setting.reindex and cuts else None
        with self._biased(bias, shorten, anew):
            kwargs = {"position_ids": position[:, None] if len(position) > 1 else position}
            kwargs["attention_mask"] = torch.ones(1, T + new, dtype=torch.long)  # not "packed"
            if visual is not None:
                kwargs |= dict(zip(VISUAL, (visual[None], added), strict=True))
            out = self.lm(inputs_embeds=embeds[None], use_cache=False, **kwargs)
        return self.model.lm_head(out.last_hidden_state[0, len(now.source) - 1 :])

    def _sees(self, layer: int, position: Tensor, prompt: list[Tensor], reindexed: bool) -> Tensor:
        """[T + new, T + new] bool: tokens of the prompt see what they saw in stock, the answer what
        is before it. prompt  [T, T] bool, per layer"""
        (T, _), L, window = prompt[0].shape, position.shape[1], self._window(layer)
        sees = torch.ones(L, L, dtype=torch.bool).tril()
        sees[:T, :T] = prompt[layer]
        if window is None:
            return sees
        inside = position[0][:, None] - position[0] < window
        if reindexed:  # a shorter sequence has more of itself in its window
            full = next(sees for i, sees in enumerate(prompt) if self._window(i) is None)
            block = full & full.T
            whole = bool((prompt[layer] & block & ~inside[:T, :T]).any())
            sees[:T, :T] = (full & inside[:T, :T]) | (block & whole)
        sees[T:] &= inside[T:]
        return sees

    def _window(self, layer: int) -> int | None:
        kinds = getattr(self.lm.config, "layer_types", None)
        sliding = kinds is not None and kinds[layer] == "sliding_attention"
        return self.lm.config.sliding_window if sliding else None

    @contextmanager
    def _biased(self, bias, shorten, anew):
        """Gives every layer its own mask, bias(layer, cos, sin) [L, L], the tokens that are left,
        shorten(layer, x) -> (x [1, L, C], which those are), and, where these are counted anew, what
        their positions anew() [1, L] turn by."""
        kept: list[list[int]] = []

        def hook(layer: int):
            def replace(module, args, kwargs):
                x, left = shorten(layer, args[0])
                kept.extend([left] if left is not None else [])
                for name, value in kwargs.items():
                    if name.startswith("position_embeddings") and value is not None:
                        for left in kept:
                            value = tuple(each[..., left, :] for each in value)
                        if anew is not None:
                            value = self._turned(layer, name, x, anew())
                        kwargs = {**kwargs, name: value}
                args = (x, *args[1:])
                cos, sin = self._turns(module, args, kwargs)
                return args, {**kwargs, "attention_mask": bias(layer, cos, sin)[None, None]}

            return replace

        hooks = [
            module.register_forward_pre_hook(hook(layer), with_kwargs=True)
            for layer, module in enumerate(self.lm.layers)
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _turned(self, layer: int, name: str, x: Tensor, position: Tensor):
        if name == "position_embeddings_local":  # Gemma 3 before 5.0
            return self.lm.rotary_emb_local(x, position)
        if self.lm.config.model_type == "gemma3_text" and name == "position_embeddings":
            return self.lm.rotary_emb(x, position, self.lm.config.layer_types[layer])
        return self.lm.rotary_emb(x, position)

    def _turns(self, layer, args, kwargs) -> tuple[Tensor, Tensor]:
        """cos and sin [L, D] that a layer turns its queries and keys by."""
        kinds = getattr(self.lm.config, "layer_types", None)
        cohere = self.lm.config.model_type == "cohere2"  # turns where it has a window
        still = cohere and kinds[layer.self_attn.layer_idx] == "full_attention"
        if still or not getattr(layer.self_attn, "use_rope", True):
            still = torch.ones_like(kwargs["hidden_states"][0] if not args else args[0][0])
            return still, torch.zeros_like(still)
        if "position_embeddings" in kwargs:
            pair = kwargs["position_embeddings"]
        else:  # Gemma 3 before 5.0
            kind = "local" if layer.self_attn.is_sliding else "global"
            pair = kwargs[f"position_embeddings_{kind}"]
        if pair[0].dim() == 3:
            return tuple(x[0] for x in pair)
        # M-RoPE before 5.0 hands on all three axes; attention takes them section by section.
        sections = self.lm.config.rope_scaling["mrope_section"] * 2
        return tuple(
            torch.cat([x[i % 3, 0] for i, x in enumerate(x.split(sections, -1))], -1) for x in pair
        )


def _allowed(mask: Tensor | None, S: int) -> Tensor:
    """[S, S] bool from a mask of stock's, for one row."""
    if mask is None:
        return torch.ones(S, S, dtype=torch.bool).tril()
    mask = mask[0, 0, :, :S]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
