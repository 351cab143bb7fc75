"""The cases of the tests of all families: which, and a ragged batch for each."""

import pytest
import transformers
from family_checks import MASKS, MROPE

from restore_ext.testing.models import RAGGED, TINY, Picture, make_inputs

ELSEWHERE = (*MROPE, *MASKS)  # in test_hf_families_*.py, whose reference knows their layers
CASES = [
    name
    for name, tiny in TINY.items()
    if hasattr(transformers, tiny.model_class) and name not in ELSEWHERE
]
each_case = pytest.mark.parametrize("family", CASES)
# Newlines are in these; a row of "several" has two images or more.
PACKED = [name for name in CASES if name.startswith(("llava_next", "llava_onevision"))]
TILED = [name for name in PACKED if not name.endswith("several")]
SEVERAL = [(5, Picture(8, 12), 3, Picture(8, 8), 7), (9, Picture(6, 10), Picture(8, 8), 4)]
PRUNED = {"size": False, "distance": False}
RATIO = 0.3


def rows_of(family: str) -> list:
    return SEVERAL if family.endswith("several") else RAGGED


def pictures_of(family: str) -> list[Picture]:
    return [part for row in rows_of(family) for part in row if isinstance(part, Picture)]


def one_by_one(family: str, rows: list | None = None) -> list[dict]:
    """The inputs of each row of a ragged batch, by itself."""
    rows = rows_of(family) if rows is None else rows
    return [make_inputs(family, [row], seed=seed) for seed, row in enumerate(rows)]
