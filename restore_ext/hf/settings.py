"""What a caller asked for, checked and completed before any work is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from restore_ext import checks
from restore_ext.methods import Method, find_method
from restore_ext.reduce import ANCHOR_MODES

POSITIONS = ("original", "reindex")
CALIBRATIONS = ("size+distance", "size", "none")
LAYER0 = ("uniform", "size")
DEFAULT_LAYER0 = "size"
BACKENDS = ("op", "mask")


@dataclass(frozen=True)
class Settings:
    """The options of attach(), which explains them; none is left open."""

    method: str
    keep: int | tuple[int, ...] | None
    keep_ratio: float | None
    restore: bool
    positions: str
    calibrate: str
    layer0: str
    decode_distance: bool
    backend: str
    retain: float
    anchor_mode: str
    seed: int

    @property
    def chosen(self) -> Method:
        return find_method(self.method)

    @property
    def needs_scores(self) -> bool:
        return self.chosen.needs_scores

    @property
    def sizes(self) -> bool:
        return self.calibrate != "none"

    @property
    def distance(self) -> bool:
        return self.calibrate == "size+distance"

    def budgets(self, tokens: Sequence[int], owner: Sequence[int], images: int) -> list[int]:
        """How many tokens to keep of each of `images` images.

        tokens  the tokens of each image
        owner   which of the numbers in `keep` counts for each image, if there are several
        """
        if isinstance(self.keep, tuple):
            return [self.keep[owner[i]] for i in range(images)]
        if self.keep is not None:
            return [self.keep] * images
        assert self.keep_ratio is not None
        return [max(1, round(self.keep_ratio * n)) for n in tokens]


def make_settings(
    *,
    axes: int,
    method: Any,
    keep: Any,
    keep_ratio: Any,
    restore: Any,
    positions: Any,
    calibrate: Any,
    layer0: Any,
    decode_distance: Any,
    backend: Any,
    retain: Any,
    anchor_mode: Any,
    seed: Any,
) -> Settings:
    """Settings from the raw options; axes is 3 for M-RoPE, 1 for RoPE.

    raises  TypeError, ValueError: naming the argument, what was wanted and what came
    """
    find_method(method)
    keep, keep_ratio = _budget(keep, keep_ratio)
    checks.require_flag("restore", restore)
    mrope = axes > 1
    if positions is None:
        positions = "original" if restore or mrope else "reindex"
    checks.require_one_of("positions", positions, POSITIONS)
    if positions == "reindex" and mrope:
        raise ValueError(
            "positions must be 'original' for a model with M-RoPE: 'reindex' has no meaning for "
            "positions of three axes, got 'reindex'"
        )
    if calibrate is None:
        calibrate = "size+distance" if restore else "none"
    checks.require_one_of("calibrate", calibrate, CALIBRATIONS)
    checks.require_one_of("layer0", layer0, LAYER0)
    checks.require_flag("decode_distance", decode_distance)
    checks.require_one_of("backend", backend, BACKENDS)
    checks.require_one_of("anchor_mode", anchor_mode, ANCHOR_MODES)
    return Settings(
        method,
        keep,
        keep_ratio,
        restore,
        positions,
        calibrate,
        layer0,
        decode_distance,
        backend,
        checks.require_share("retain", retain),
        anchor_mode,
        checks.require_int("seed", seed),
    )


def _budget(keep: Any, keep_ratio: Any) -> tuple[int | tuple[int, ...] | None, float | None]:
    if isinstance(keep, Tensor):
        checks.require_budgets(keep, keep_ratio, keep.numel())
        keep = keep.tolist()
    several = isinstance(keep, (list, tuple))
    if several and not len(keep):
        raise ValueError(f"keep must be one int or one per image, got {keep!r}")
    budgets = checks.require_budgets(keep, keep_ratio, len(keep) if several else 1)
    if isinstance(budgets, float):
        return None, budgets
    return (tuple(budgets) if several else budgets[0]), None
