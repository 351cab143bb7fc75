"""The reader: a transformer encoder makes 160 tokens of a line, a decoder attends to them.

Its class is `KiriOCR` of the package kiri-ocr (Apache-2.0), its weights are those of smart-kh-ocr
(MIT): a convolution stem, 6 encoder layers, 4 decoder layers, d = 384, 22.7 million parameters.
Here it reads many lines at a time, and its cross-attention takes the sizes of merged tokens.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from restore_ext import ops

INSTALL = "pip install --no-deps smart-kh-ocr==0.1.7 kiri-ocr==0.2.15"
WEIGHTS = "weights/khmer_ocr_v6.pt"
# Of the lines that are read at a time: where fewer go on, copying them costs less than the others.
WORTH_LEAVING = 0.7


class Encoded(NamedTuple):
    """B lines as the decoder gets them."""

    tokens: Tensor  # [B, N, C] projected
    received: Tensor  # [B, N] float32, attention received in the last encoder layer


class Reader:
    """A KiriOCR, or what has its parts, in eval mode."""

    def __init__(self, model: Any, fingerprint: str = "") -> None:
        self.model = model.eval()
        self.fingerprint = fingerprint  # of the weights

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Lines as `lines.draw` makes them."""
        model = self.model
        pixels = torch.from_numpy(np.stack([np.array(image) for image in images]))[:, None]
        x = model.pos2d(model.stem(pixels.float() / 127.5 - 1))
        x = model.enc_ln_in(x.mean(2).mT)
        *before, last = model.enc.layers
        for layer in before:
            x = layer(x)
        query, key, _ = _heads(last.self_attn, last.norm1(x))
        received = ops.row_scores(query, key)
        return Encoded(model.mem_proj(model.enc_ln(last(x))), received)

    @torch.no_grad()
    def read(self, tokens: Tensor, log_size: Tensor | None = None, *, longest: int) -> list[str]:
        """What the lines say, greedily.

        tokens    [B, M, C]
        log_size  [B, M] float32, added to the logits of cross-attention in every layer
        longest   characters after which a line ends in any case
        """
        spelling = self.model.tok
        decoding = Decoding(self.model, tokens, log_size)
        rows = torch.arange(len(tokens))
        word = torch.full((len(tokens),), spelling.dec_bos)
        said = torch.full((len(tokens), longest), spelling.dec_eos)
        going = torch.ones(len(tokens), dtype=torch.bool)
        for step in range(longest):
            word = decoding.step(word).argmax(-1)
            going &= word != spelling.dec_eos
            said[rows[going], step] = word[going]
            left = int(going.sum())
            if not left:
                break
            if left < WORTH_LEAVING * len(rows):
                rows, word = rows[going], word[going]
                decoding.keep(going)
                going = going[going]
        return [self._spell(line) for line in said.tolist()]

    def _spell(self, ids: list[int]) -> str:
        spelling = self.model.tok
        end = ids.index(spelling.dec_eos) if spelling.dec_eos in ids else len(ids)
        return spelling.decode_dec(ids[:end])


class Decoding:
    """The decoder of KiriOCR, character by character, for B lines at a time.

    tokens    [B, M, C], what is attended to
    log_size  [B, M] float32 or None, see Reader.read
    """

    def __init__(self, model: Any, tokens: Tensor, log_size: Tensor | None) -> None:
        self.model, self.log_size = model, log_size
        crossing = (layer.multihead_attn for layer in model.dec.layers)
        self.memory: list[tuple[Tensor, Tensor]] = []
        for attention in crossing:
            _, key, value = _heads(attention, tokens)
            self.memory.append((key, value))
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.memory)
        self.length = 0

    def step(self, word: Tensor) -> Tensor:
        """The logits [B, V] of the next character after `word` [B]."""
        model = self.model
        x = model.dec_emb(word)[:, None]
        if model.dec_pos_enc is not None:
            x = x + model.dec_pos_enc.pe[:, self.length : self.length + 1]
        for index, layer in enumerate(model.dec.layers):
            x = x + self._recall(index, layer.self_attn, layer.norm1(x))
            x = x + self._look(index, layer.multihead_attn, layer.norm2(x))
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        self.length += 1
        return model.dec_head(model.dec_ln(x))[:, 0]

    def keep(self, going: Tensor) -> None:
        """Goes on with the lines that `going` [B] bool marks."""
        self.memory = [(key[going], value[going]) for key, value in self.memory]
        self.past = [None if kv is None else (kv[0][going], kv[1][going]) for kv in self.past]
        if self.log_size is not None:
            self.log_size = self.log_size[going]

    def _recall(self, index: int, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        query, key, value = _heads(attention, x)
        past = self.past[index]
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        self.past[index] = key, value
        return _joined(attention, scaled_dot_product_attention(query, key, value))

    def _look(self, index: int, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        key, value = self.memory[index]
        out = ops.calibrated_attention(
            _heads(attention, x, "q")[0], key, value, log_size=self.log_size, causal=False
        )
        assert isinstance(out, Tensor)
        return _joined(attention, out)


def _heads(attention: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> list[Tensor]:
    """Queries, keys and values [B, H, L, D] of x [B, L, C], or the first of them alone."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    rows = attention.embed_dim * len(which)
    made = linear(x, weight[:rows], bias[:rows]).chunk(len(which), -1)
    return [part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in made]


def _joined(attention: nn.MultiheadAttention, out: Tensor) -> Tensor:
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def load_reader() -> Reader:
    """The reader of the installed packages, float32 on the CPU.

    raises  ModuleNotFoundError: one of them is not installed; says how to
    """
    weights = _folder("smart_kh_ocr") / WEIGHTS
    file = _folder("kiri_ocr") / "model.py"  # by path: the package itself wants opencv and more
    spec = importlib.util.spec_from_file_location("restore_ext_kiri_ocr_model", file)
    assert isinstance(spec, ModuleSpec) and spec.loader is not None
    kiri = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kiri)
    content = torch.load(weights, map_location="cpu", weights_only=True)
    known = {field.name for field in dataclasses.fields(kiri.CFG)}
    config = kiri.CFG(**{n: v for n, v in content["config"].items() if n in known})
    spelling = kiri.CharTokenizer(str(weights.parent / "vocab.json"), config)
    state = content["model"]
    with torch.random.fork_rng(devices=[]):
        model = kiri.KiriOCR(config, spelling, use_dec_pos_enc="dec_pos_enc.pe" in state)
    model.load_state_dict(state)
    return Reader(model, hashlib.sha256(weights.read_bytes()).hexdigest()[:16])


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: {INSTALL}", name=package)
    return Path(found.submodule_search_locations[0])
