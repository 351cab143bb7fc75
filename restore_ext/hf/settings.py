"""What a caller asked for, checked and completed before any work is done."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor

from restore_ext import checks
from restore_ext.methods import METHODS, TOWER_METHODS, Method, find_method
from restore_ext.methods.problem import PROJECTED
from restore_ext.reduce import ANCHOR_MODES
from restore_ext.stages import STAGE_METHODS, Request, Stage, make_stages, read_schedule

POSITIONS = ("original", "reindex")
CALIBRATIONS = ("size+distance", "size", "none")
LAYER0 = ("uniform", "size")
DEFAULT_LAYER0 = "size"
BACKENDS = ("op", "mask")
BUDGETS = ("per_image", "shared")
DEFAULT_MIN_VISUAL_TOKENS = 0  # none: docs/bench.md has the measurement that says so
WHOLE = Method()  # what does nothing to an image on its way into the language model


@dataclass(frozen=True)
class Settings:
    """The options of attach(), which explains them; none is left open."""

    method: str | None  # None: images go into the language model whole
    options: Mapping[str, Any]
    budget: str
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
    inside: str | None = None  # the method that cuts inside the language model
    stages: tuple[Stage, ...] = ()  # what it does there
    # Where keep is one per image, or a total: the stages of an image that keeps so many.
    stages_of: Callable[[int], tuple[Stage, ...]] | None = None
    min_visual_tokens: int = DEFAULT_MIN_VISUAL_TOKENS

    @property
    def chosen(self) -> Method:
        return WHOLE if self.method is None else find_method(self.method)

    @property
    def needs_scores(self) -> bool:
        return self.chosen.needs_scores

    @property
    def sizes(self) -> bool:
        return self.calibrate != "none"

    @property
    def distance(self) -> bool:
        return self.calibrate == "size+distance"

    def budgets(
        self, tokens: Sequence[int], owner: Sequence[int], rows: Sequence[int]
    ) -> list[int]:
        """How many tokens of each image go into the language model.

        tokens  the tokens of each image
        owner   which of the numbers in `keep` counts for each image, if there are several
        rows    the row of each image, rising
        """
        if self.method is None:
            return list(tokens)
        spared, budgets = self.spared(tokens, rows), self._split(tokens, owner, rows)
        return [
            n if whole else budget for n, whole, budget in zip(tokens, spared, budgets, strict=True)
        ]

    def spared(self, tokens: Sequence[int], rows: Sequence[int]) -> list[bool]:
        """Which images stay whole from the first layer to the last: those of a prompt that has too
        few visual tokens to begin with. A tower sees no prompts: there it is a picture of too few.

        tokens, rows  as for budgets(), of all images of the prompts
        """
        of_input = list(tokens)
        if self.chosen.place == PROJECTED:
            total: Counter[int] = Counter()
            for n, row in zip(tokens, rows, strict=True):
                total[row] += n
            of_input = [total[row] for row in rows]
        return [n < self.min_visual_tokens for n in of_input]

    def stages_for(
        self, tokens: Sequence[int], owner: Sequence[int], rows: Sequence[int]
    ) -> list[tuple[Stage, ...]]:
        """The cuts of each image, which differ in nothing but how many tokens they keep."""
        if self.stages_of is None:
            return [self.stages] * len(tokens)
        return [self.stages_of(keep) for keep in self._split(tokens, owner, rows)]

    def _split(self, tokens: Sequence[int], owner: Sequence[int], rows: Sequence[int]) -> list[int]:
        if self.budget == "shared":
            shares: list[int] = []
            for _, images in groupby(range(len(tokens)), key=lambda i: rows[i]):
                of_row = [tokens[i] for i in images]
                shares += split_budget(self._budget(sum(of_row)), of_row)
            return shares
        if isinstance(self.keep, tuple):
            return [self.keep[owner[i]] for i in range(len(tokens))]
        return [self._budget(n) for n in tokens]

    def _budget(self, tokens: int) -> int:
        """Of so many tokens."""
        if self.keep_ratio is not None:
            return max(1, round(self.keep_ratio * tokens))
        assert isinstance(self.keep, int)
        return self.keep


def split_budget(total: int, tokens: Sequence[int]) -> list[int]:
    """One budget over several images, in proportion to their tokens.

    Every image gets one token, however small the total. What is left is shared out in proportion to
    the tokens that remain: whole shares first, then one each to the largest remainders, the earlier
    image first. So the numbers sum to the total, where that is no less than the images and no more
    than the tokens, and no image gets more than it has. Only counts decide, which the host knows.
    """
    rest = [n - 1 for n in tokens]
    left = min(max(total - len(tokens), 0), sum(rest))
    shares = [left * n // max(sum(rest), 1) for n in rest]
    remainders = [left * n % max(sum(rest), 1) for n in rest]
    by_remainder = sorted(range(len(tokens)), key=lambda i: -remainders[i])
    for i in by_remainder[: left - sum(shares)]:
        shares[i] += 1
    return [1 + share for share in shares]


def make_settings(
    *,
    axes: int,
    method: Any,
    options: Any,
    budget: Any,
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
    min_visual_tokens: Any,
    schedule: Any = None,
    depth: int | None = None,
) -> Settings:
    """Settings from the raw options; axes is 3 for M-RoPE, 1 for RoPE; depth is the number of
    decoder layers, where these can be hooked.

    raises  TypeError, ValueError: naming the argument, what was wanted and what came
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict of the method's options, got {options!r}")
    retain = checks.require_share("retain", retain)
    checks.require_one_of("anchor_mode", anchor_mode, ANCHOR_MODES)
    asked = _schedule(method, keep, keep_ratio, options, schedule)
    checks.require_one_of("budget", budget, BUDGETS)
    stages: tuple[Stage, ...] = ()
    stages_of = None
    if asked is not None and schedule is None and _each_its_own(method, keep, budget):
        keep, keep_ratio = _budget(keep, keep_ratio)
        _require_one_total(budget, keep)
        make = partial(_stages, asked, depth, retain, anchor_mode)
        stages, stages_of = make(keep[0] if isinstance(keep, tuple) else 1), make
    elif asked is not None:
        stages = _stages(asked, depth, retain, anchor_mode)
    # Where nothing is said of the tokens that go into the language model, all of them do.
    alone = asked is not None and (schedule is None or keep is keep_ratio is None)
    inside = STAGE_METHODS[asked["method"]] if asked is not None and alone else None
    if isinstance(method, str):
        checks.require_one_of("method", method, (*METHODS, *TOWER_METHODS, *STAGE_METHODS))
    chosen = WHOLE
    if asked is not None and inside is not None:
        if stages_of is None:
            _require_no_more(asked["method"], budget, options, schedule)
            keep, keep_ratio = None, None
        method, options = None, {}
    else:
        chosen = find_method(method, options)
        keep, keep_ratio = _budget(keep, keep_ratio)
        _require_one_total(budget, keep)
    checks.require_flag("restore", restore)
    if chosen.place != PROJECTED and (isinstance(keep, tuple) or budget == "shared"):
        raise ValueError(
            f"keep must be one int and budget 'per_image' for method {method}, which treats the "
            f"pictures of a batch alike, got keep={keep!r} and budget={budget!r}"
        )
    restore = restore and chosen.restores
    mrope = axes > 1
    if positions is None:
        reindexes = inside is None or inside.reindexes
        positions = "original" if restore or mrope or not reindexes else "reindex"
    checks.require_one_of("positions", positions, POSITIONS)
    if positions == "reindex" and mrope:
        raise ValueError(
            "positions must be 'original' for a model with M-RoPE: 'reindex' has no meaning for "
            "positions of three axes, got 'reindex'"
        )
    if calibrate is None:
        adds = inside is None or inside.restore != "nothing"
        calibrate = "size+distance" if restore and adds else "none"
    checks.require_one_of("calibrate", calibrate, CALIBRATIONS)
    checks.require_one_of("layer0", layer0, LAYER0)
    checks.require_flag("decode_distance", decode_distance)
    checks.require_one_of("backend", backend, BACKENDS)
    return Settings(
        method,
        dict(options),
        budget,
        keep,
        keep_ratio,
        restore,
        positions,
        calibrate,
        layer0,
        decode_distance,
        backend,
        retain,
        anchor_mode,
        checks.require_int("seed", seed),
        None if asked is None else asked["method"],
        stages,
        stages_of,
        checks.require_not_negative("min_visual_tokens", min_visual_tokens),
    )


def _schedule(
    method: Any, keep: Any, keep_ratio: Any, options: Mapping[str, Any], schedule: Any
) -> dict[str, Any] | None:
    """What is to be done inside the language model; None if nothing."""
    named = isinstance(method, str) and method in STAGE_METHODS
    if schedule is not None and named:
        raise ValueError(
            f"schedule must be None where method is {method!r}, which is one itself, got "
            f"{schedule!r}"
        )
    if schedule is not None:
        return read_schedule(schedule)
    return {"method": method, "keep": keep, "keep_ratio": keep_ratio, **options} if named else None


def _require_one_total(budget: str, keep: Any) -> None:
    if budget == "shared" and isinstance(keep, tuple):
        raise ValueError(
            f"keep must be one int for budget='shared', the total of a row, got {list(keep)}"
        )


def _require_no_more(name: str, budget: str, options: Any, schedule: Any) -> None:
    """Refuses what would be passed over where nothing is reduced before the language model."""
    if budget != "per_image":
        raise ValueError(
            f"budget must be 'per_image' for method {name}, which takes none here, got {budget!r}"
        )
    if schedule is not None and options:
        raise ValueError(
            "options must be None for a schedule without keep or keep_ratio: a schedule's own "
            f"stand beside its 'method', got {dict(options)}"
        )


def _each_its_own(method: str, keep: Any, budget: str) -> bool:
    """Whether the images may keep different numbers of tokens inside the language model."""
    several = isinstance(keep, (list, tuple, Tensor)) or budget == "shared"
    return several and STAGE_METHODS[method].budget


def _stages(
    asked: Mapping[str, Any],
    depth: int | None,
    retain: float,
    anchor_mode: str,
    own: int | None = None,
) -> tuple[Stage, ...]:
    """own: the tokens to keep of one image, whatever is asked for all"""
    options = dict(asked)
    method, keep, keep_ratio = (options.pop(n, None) for n in ("method", "keep", "keep_ratio"))
    if depth is None:
        raise NotImplementedError(
            f"method {method!r} works inside the language model, which is left to generate() here: "
            "use attach()"
        )
    if own is not None:
        keep, keep_ratio = own, None
    return make_stages(method, Request(depth, keep, keep_ratio, retain, anchor_mode), options)


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
