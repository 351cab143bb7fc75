"""How RoPE lets attention fade with distance, read from the model's own rotary embedding."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# These turn only their sliding layers, and say so nowhere but in their attention's forward.
_TURNS_ONLY_SLIDING = ("cohere2", "exaone")


def rope_decay(model_or_config: Any, length: int, layer: int | None = None) -> Tensor | None:
    """The decay table of a model: what `calibrated_attention` takes as `decay`.

    decay[g, d] is the sum of cos(d * theta) over the frequencies theta that the position's axis g
    turns, divided by the number of all frequencies: its sum over g is the mean cosine between a
    vector of ones and itself d positions on (RESTORE, arXiv 2606.01711, section 3.2 and, for
    M-RoPE, appendix A), 1 at distance 0. Components that RoPE leaves alone do not count; scaled
    frequencies are those the model turns by now; the attention factor of a scaling is left out.

    model_or_config  a transformers model (multimodal, causal or text), or its config
    length           how many distances, P >= 1
    layer            index of the decoder layer; needed where layers differ in their RoPE

    returns  [G, P] float32, on the model's device; G is 1, or the number of M-RoPE's axes.
             None where the layer has no RoPE.
    raises   TypeError: neither a model nor a config. ValueError: length or layer out of range, or
             no layer given where they differ.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    decoder = _decoder(model_or_config)
    count = decoder.config.num_hidden_layers
    if layer is not None and not 0 <= layer < count:
        raise ValueError(f"layer must be in [0, {count}), got {layer}")

    turns = [_turn(decoder, i) for i in (range(count) if layer is None else [layer])]
    for i, turn in enumerate(turns):
        if not _same(turn, turns[0]):
            raise ValueError(
                f"layer must be given: in {type(decoder).__name__}, layer {i} has another RoPE "
                "than layer 0"
            )
    return _table(turns[0], length)


def rope_decays(model_or_config: Any, length: int) -> list[Tensor | None]:
    """rope_decay() of every layer; layers of one RoPE share one table."""
    decoder = _decoder(model_or_config)
    turns = [_turn(decoder, layer) for layer in range(decoder.config.num_hidden_layers)]
    first = [next(i for i, other in enumerate(turns) if _same(turn, other)) for turn in turns]
    tables = {i: _table(turns[i], length) for i in set(first)}
    return [tables[i] for i in first]


class _Turn(NamedTuple):
    frequency: Tensor  # [n] float64
    axis: Tensor  # [n] int64, the axis of the position that each frequency turns with
    axes: int


def _table(turn: _Turn | None, length: int) -> Tensor | None:
    if turn is None:
        return None
    distance = torch.arange(length, dtype=torch.float64, device=turn.frequency.device)
    cosine = torch.cos(distance[:, None] * turn.frequency) / len(turn.frequency)
    table = cosine.new_zeros(length, turn.axes).index_add(1, turn.axis, cosine)
    return table.T.float().contiguous()


def _same(a: _Turn | None, b: _Turn | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.frequency, b.frequency) and torch.equal(a.axis, b.axis)


def _decoder(model_or_config: Any) -> Any:
    """The text model: the module that holds the decoder layers."""
    model = model_or_config
    if hasattr(model, "get_text_config"):  # a config; a model of it has its shape, not its weights
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(model)
    if not hasattr(model, "get_decoder"):
        kind = type(model).__name__
        raise TypeError(f"model_or_config must be a transformers model or config, got {kind}")
    while not hasattr(model, "layers"):
        inner = model.get_decoder()
        if inner is model:  # some leave out that their decoder has a decoder
            inner = getattr(model, "model", None)
        if inner is None:
            break
        model = inner
    return model


def _turn(decoder: Any, layer: int) -> _Turn | None:
    """What a layer's queries and keys are turned by; None if they are not."""
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else None
    blocks = getattr(decoder, "layers", None)
    block = blocks[layer] if blocks is not None else None
    attention = getattr(block, "self_attn", None)
    if not getattr(attention, "use_rope", True):  # Llama 4, SmolLM 3
        return None
    if config.model_type.startswith(_TURNS_ONLY_SLIDING) and kind == "full_attention":
        return None

    local = getattr(decoder, "rotary_emb_local", None)  # Gemma 3 before transformers 5
    if local is not None and kind == "sliding_attention":
        rotary = local
    else:
        within = [*block.modules()] if block is not None else []
        # The decoder's own first: some attentions keep one that they do not use.
        places = (*decoder.children(), *within, *decoder.modules())
        rotary = next((m for m in places if _frequencies(m)), None)
    if rotary is None:
        return None
    if any(t.is_meta for t in _frequencies(rotary).values()):
        with torch.device("cpu"):
            rotary = type(rotary)(rotary.config)
    by_name = _frequencies(rotary)
    name = "inv_freq" if "inv_freq" in by_name else f"{kind}_inv_freq"
    if name not in by_name:
        return None
    frequency = by_name[name].detach().double()
    sections = _sections(rotary, kind)
    axis = _axis(rotary, sections, kind, len(frequency)).to(frequency.device)
    turned = frequency != 0  # proportional RoPE keeps a zero for what it leaves alone
    return _Turn(frequency[turned], axis[turned], max(len(sections), 1))


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of angles per position; of one name, or one for each type of layer."""
    buffers = module.named_buffers(recurse=False)
    return {n: t for n, t in buffers if n.endswith("inv_freq") and "original" not in n}


def _sections(rotary: Any, kind: str | None) -> list[int]:
    """M-RoPE's number of frequencies for each axis of the position; empty for plain RoPE."""
    sections = getattr(rotary, "mrope_section", None)
    if sections is None:
        config = rotary.config
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        sections = (scaling or {}).get("mrope_section")
    if isinstance(sections, dict):
        sections = sections.get(kind)
    return list(sections or [])


def _axis(rotary: Any, sections: list[int], kind: str | None, n: int) -> Tensor:
    """The axis of each frequency, found by turning one axis at a time: models lay them out as they
    like, and some say otherwise in their config."""
    axis = torch.zeros(n, dtype=torch.int64)
    if not sections:
        return axis
    rotary = copy.deepcopy(rotary)  # dynamic scaling changes the module as it runs
    device = next(rotary.buffers()).device
    typed = () if "inv_freq" in _frequencies(rotary) else (kind,)
    for g in range(1, len(sections)):
        position = torch.zeros(len(sections), 1, 1, dtype=torch.int64, device=device)
        position[g] = 1
        sine = rotary(torch.zeros(1, device=device), position, *typed)[1].cpu()
        if sine.dim() == 4:  # all axes apart; attention then takes them section by section
            return torch.arange(len(sections)).repeat_interleave(torch.tensor(sections))
        sine = sine.flatten()
        # The cosines of a frequency stand n apart, or side by side.
        halves = torch.equal(sine[:n], sine[-n:])
        axis[(sine[:n] if halves else sine[::2]) != 0] = g
    return axis
