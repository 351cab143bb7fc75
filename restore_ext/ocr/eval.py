"""What the reader reads right from fewer tokens, for every way of reducing them after its encoder.

Every configuration reads the same lines, so that differences are paired. RESTORE means anchors and
log-size here: the decoder's cross-attention has no positions that could be kept, and no RoPE.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from restore_ext.methods import METHODS
from restore_ext.methods.problem import CLS, RECEIVED
from restore_ext.ocr.lines import LONGEST, Line, character_errors, draw
from restore_ext.ocr.reader import Encoded, Reader
from restore_ext.pocket.eval import Estimate, estimate
from restore_ext.reduce import reduce_tokens

TOKENS = 160
BUDGETS = (120, 80, 40)
RETAIN_METHOD = "divprune"  # the pruner whose share of tokens left alone is varied
RETAINS = (0.8, 1.0)
BATCH = 64
SLACK = 8  # characters that a reading may be longer than the longest line

Errors = dict[str, list[int]]  # configuration -> line by line, the edit distance to what it says


@dataclass(frozen=True)
class Configuration:
    """A name and what reduce_tokens() is given; no options: all tokens."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def configurations() -> list[Configuration]:
    """Everything the table shows, named "full" or METHOD/BUDGET/WAY."""
    named = [Configuration("full")]
    for keep in BUDGETS:
        for method in methods():
            given = {"method": method, "keep": keep}
            ways: dict[str, dict[str, Any]] = {
                "plain": {"restore": False},
                "paper": {"restore": True, "retain": 0.5, "anchor_mode": "paper"},
            }
            if method == RETAIN_METHOD:
                ways |= {f"retain {share}": {**ways["paper"], "retain": share} for share in RETAINS}
            named += [
                Configuration(f"{method}/{keep}/{w}", {**given, **o}) for w, o in ways.items()
            ]
    return named


def methods() -> list[str]:
    """The methods that need nothing the reader's encoder lacks."""
    return [name for name, method in METHODS.items() if method.scores != CLS]


def left_out() -> dict[str, str]:
    """The other methods in front of a language model, with the reason."""
    no_cls = {name: "no CLS token" for name, method in METHODS.items() if method.scores == CLS}
    return {
        **no_cls,
        "tome_vit": "its hook is for towers of transformers",
        "downsample": "the encoder takes one picture size",
    }


def evaluate(
    reader: Reader, lines: int, chosen: Sequence[Configuration]
) -> Iterator[tuple[str, list[int]]]:
    """Reads lines 0..lines-1; first yields ("", []) for every batch encoded, then the character
    errors of each configuration."""
    drawn = [draw(index) for index in range(lines)]
    parts = []
    for start in range(0, lines, BATCH):
        parts.append(reader.encode([line.image for line in drawn[start : start + BATCH]]))
        yield "", []
    encoded = Encoded(*map(torch.cat, zip(*parts, strict=True)))
    for configuration in chosen:
        yield configuration.name, errors(reader, encoded, drawn, configuration)


def errors(
    reader: Reader, encoded: Encoded, drawn: Sequence[Line], configuration: Configuration
) -> list[int]:
    """The character errors of every line under one configuration."""
    tokens, log_size = encoded.tokens, None
    if configuration.options:
        scored = METHODS[configuration.options["method"]].scores == RECEIVED
        scores = encoded.received if scored else None
        reduction = reduce_tokens(tokens, scores=scores, **configuration.options)
        tokens = reduction.tokens
        log_size = reduction.size.log() if configuration.options["restore"] else None
    read = reader.read(tokens, log_size, longest=LONGEST + SLACK)
    return [character_errors(a, line.text) for a, line in zip(read, drawn, strict=True)]


def exact(wrong: Sequence[int]) -> Estimate:
    """The share of lines without an error."""
    return estimate([float(w == 0) for w in wrong])


def more_exact(wrong: Sequence[int], base: Sequence[int]) -> Estimate:
    """The same, minus that of `base`, line by line."""
    return estimate([float(w == 0) - float(b == 0) for w, b in zip(wrong, base, strict=True)])


def error_rate(wrong: Sequence[int], characters: Sequence[int]) -> Estimate:
    """Errors per character (CER): all errors over all characters of the given lines."""
    mean = sum(characters) / len(characters)
    return estimate([w / mean for w in wrong])


def characters(lines: int) -> list[int]:
    """The length of every line."""
    return [len(draw(index).text) for index in range(lines)]
