"""Positions and sizes of the tokens of a prompt, in the one per-token channel vLLM has: M-RoPE's.

vLLM lets a model with M-RoPE give every token of a prompt several integers, which it then cuts,
batches, caches and moves along with the tokens; of a generated token all are the next position. So:

rows 0, 1, 2   the position on each axis, three times the same for plain RoPE
row SIZE       row 0 + size - 1: a generated token has size 1 without being told
row BASE       the position that the token's image begins at; of text, its own
row DELTA      the same all along: how far the next position is ahead of the number of tokens

An image's own part is known once it is encoded. Until then it waits as columns behind its features,
in digits that every dtype holds exactly, for the encoder's cache keeps nothing but features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = 3
SIZE, BASE, DELTA = 3, 4, 5
ROWS = 6
DIGIT = 256  # bfloat16 holds every integer up to this
COLUMNS = 2 * (AXES + 1)


@dataclass(frozen=True)
class Item:
    """An image in a prompt."""

    offset: int  # its first token
    tokens: int  # how many it has there
    span: int  # how far positions go on behind it, from where it begins


def prompt_rows(length: int, items: Sequence[Item]) -> tuple[Tensor, int]:
    """Rows [ROWS, length] int64 of a prompt whose images are still to come, and DELTA.

    items  in the order of the prompt
    """
    steps = torch.ones(length, dtype=torch.int64)  # from a token's position to the next one's
    for item in items:
        steps[item.offset : item.offset + item.tokens] = 0
        steps[item.offset + item.tokens - 1] = item.span
    past = steps.cumsum(0)
    rows = (past - steps).repeat(ROWS, 1)
    delta = int(past[-1]) - length if length else 0
    rows[DELTA] = delta
    return rows, delta


def with_columns(tokens: Tensor, place: Tensor, size: Tensor) -> Tensor:
    """Features [n, C] with what is known of them behind: [n, C + COLUMNS].

    place  [n, AXES] int64, positions from the image's beginning, below 2 ** 16
    size   [n], integers in any dtype, 1 to 2 ** 16
    """
    numbers = torch.cat([place, size[:, None].long() - 1], 1)
    digits = torch.cat([numbers // DIGIT, numbers % DIGIT], 1)
    return torch.cat([tokens, digits.to(tokens)], 1)


def fill_rows(rows: Tensor, is_image: Tensor, columns: Tensor, computed: int) -> Tensor:
    """The rows once the next images, or parts of images, are encoded; doing it again is no harm.

    rows      [ROWS, L] of the prompt
    is_image  [L] bool, which of its tokens are features
    columns   [n, COLUMNS] of the first n of these from token `computed` on
    """
    here = computed + is_image[computed:].nonzero()[: len(columns), 0]
    digits = columns.long().T  # [COLUMNS, n]
    numbers = digits[: AXES + 1] * DIGIT + digits[AXES + 1 :]
    rows = rows.clone()
    rows[:AXES, here] = rows[BASE, here] + numbers[:AXES].to(rows)
    rows[SIZE, here] = rows[0, here] + numbers[AXES].to(rows)
    return rows


def log_sizes(rows: Tensor) -> Tensor:
    """[L] float32 of rows [ROWS, L]."""
    return (rows[SIZE] - rows[0] + 1).clamp(min=1).float().log()
