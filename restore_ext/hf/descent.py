"""One forward of a reduced sequence on its way through the layers, which cut it further."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from restore_ext.hf.attention import STATE, Calibration, Glance
from restore_ext.hf.cache import RestoreLayer, Side
from restore_ext.hf.compat import turned
from restore_ext.hf.families import Family
from restore_ext.hf.report import Report, StageReport
from restore_ext.hf.scores import Asked
from restore_ext.hf.settings import Settings
from restore_ext.hf.step import PlannedStage, Step, make_step
from restore_ext.hf.view import View

NOBODY: dict[str, Asked] = {}


@dataclass(frozen=True)
class Extent:
    """What a forward adds to every layer of the cache, see RestoreLayer.extend."""

    logical: int
    reach: int
    croppable: int | None


@dataclass
class Stretch:
    """Layers between two cuts, on the tokens that all of them have."""

    view: View
    source: Tensor | None  # [B, T] int64, their columns in what went into the first layer
    step: Step | None = None  # the cut that the stretch begins with
    embeddings: dict[Any, Any] = field(default_factory=dict)  # of positions, once turned


class Descent:
    """What a Calibration says of a layer follows from what the layers above have cut.

    cache   its layers, each with its own length; empty without a cache
    stages  the cuts to make; askers: of each kind of score, who rates; report: where to tell of it
    """

    def __init__(
        self,
        family: Family,
        settings: Settings,
        calibration: Calibration,
        view: View,
        cache: Sequence[RestoreLayer],
        extent: Extent,
        stages: Sequence[PlannedStage] = (),
        askers: Mapping[str, Asked] = NOBODY,
        report: Report | None = None,
    ) -> None:
        self.depth = len(family.lm.layers)
        self._family, self._settings = family, settings
        self._calibration, self._cache, self._extent = calibration, cache, extent
        self._stages = {planned.stage.layer: planned for planned in stages}
        self._askers = askers
        for index, planned in self._stages.items():
            if planned.stage.scores in ("attention", "raters"):
                calibration.asked[index - 1] = askers[planned.stage.scores]
        self._report = report
        self._stretches = [Stretch(view, None)]
        self._of_layer: dict[int, Stretch] = {}
        self._positions: dict[int, Tensor] = {}  # of the queries, as the model takes them
        self._tails: dict[tuple[int, int], tuple[Side, Tensor]] = {}
        counts_anew = settings.positions == "reindex" and not settings.stages
        if counts_anew and len({layer.physical for layer in cache}) > 1:
            raise RuntimeError(
                "past_key_values was cut inside the language model: continue it with the model "
                "attached as it was then"
            )
        self._go_on(0)

    @property
    def positions(self) -> Tensor:
        """[..., B, T] for the first layer, as the model takes them."""
        return self._positions[0]

    def enter(self, index: int, layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The arguments of a decoder layer, after the cut before it; None if they stay."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if index in self._stages:
            # Recomputed layers (gradient checkpointing) find the cut made.
            step = self._made(index) or self._cut(index, layer, hidden, kwargs)
            hidden = step.shorten(hidden)
        elif self._of_layer[index].source is None and self._same_positions(index):
            return None
        kwargs = dict(kwargs)
        self._place(index, hidden, kwargs)
        if not args:
            kwargs["hidden_states"] = hidden
        return ((hidden, *args[1:]) if args else ()), kwargs

    def _made(self, index: int) -> Step | None:
        return self._of_layer[index].step if index in self._of_layer else None

    def _cut(self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Step:
        planned, before = self._stages[index], self._stretches[-1]
        step = make_step(planned, before.view, hidden, self._scores(index, layer, hidden, kwargs))
        source = step.source if before.source is None else step.gather(before.source)
        self._stretches.append(Stretch(before.view.then(step), source, step))
        self._go_on(index)
        if self._report is not None:
            self._report.stages.append(StageReport(index, planned.before, planned.after, step))
        return step

    def _scores(
        self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor | None:
        kind, calibration = self._stages[index].stage.scores, self._calibration
        if kind == "none":
            return None
        if kind == "lookahead":
            self._look_ahead(index, layer, hidden, kwargs)
            return calibration.scores.pop(index)
        return calibration.scores.pop(index - 1)

    def _look_ahead(self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Scores by a layer that has not run yet, on the tokens before the cut."""
        past = self._cache[index].side if self._cache else None
        tail, self._positions[index] = self._tail(index, past)
        self._of_layer[index] = self._stretches[-1]
        kwargs = dict(kwargs)
        self._place(index, hidden, kwargs)
        glance = Glance()
        with torch.no_grad():
            self._family.glance(layer, hidden.detach(), {**kwargs, STATE: glance})
        assert glance.query is not None and glance.key is not None
        key = glance.key if past is None else torch.cat([self._cache[index].keys, glance.key], 2)
        seen = self._calibration.anew()
        seen.blocks[index] = self._stretches[-1].view.blocks
        seen.sides[index] = tail if past is None else past.then(tail)
        seen.queries[index], seen.asked[index] = tail.position, self._askers["lookahead"]
        seen.score(index, glance.query, key, glance.kwargs)
        self._calibration.scores[index] = seen.scores[index]

    def _go_on(self, first: int) -> None:
        """Tells the layers from `first` to the next cut what their keys are."""
        stretch, calibration = self._stretches[-1], self._calibration
        past_end = min((i for i in self._stages if i > first), default=self.depth)
        for index in range(first, past_end):
            past = self._cache[index].side if self._cache else None
            tail, self._positions[index] = self._tail(index, past)
            side = tail
            if self._cache:
                extent, layer = self._extent, self._cache[index]
                layer.extend(
                    tail,
                    logical=extent.logical,
                    reach=extent.reach,
                    croppable=extent.croppable,
                )
                assert layer.side is not None
                side = layer.side
            calibration.sides[index], calibration.queries[index] = side, tail.position
            calibration.blocks[index] = stretch.view.blocks
            self._of_layer[index] = stretch

    def _tail(self, index: int, past: Side | None) -> tuple[Side, Tensor]:
        """The new keys of a layer and their positions; layers with the same past share them."""
        view, settings = self._stretches[-1].view, self._settings
        first = index == 0 and settings.layer0 == "uniform"
        key = (id(view), -1 if first else id(past))
        if key not in self._tails:
            side = view.side(settings, self._family.axes, past, index)
            self._tails[key] = side, view.counted(settings, past)
        return self._tails[key]

    def _same_positions(self, index: int) -> bool:
        """Whether the model's rotation, of the first layer's positions, is this layer's too."""
        return (
            self._settings.positions == "original"
            or not self._settings.stages
            or self._positions[index] is self._positions[0]
        )

    def _place(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Makes a layer rotate the tokens it has by the positions they have."""
        stretch = self._of_layer[index]
        kwargs["position_ids"] = None  # rotation is done with; what has gaps looks like a packing
        if kwargs.get("cache_position") is not None:  # 4.57
            kwargs["cache_position"] = kwargs["cache_position"][-hidden.shape[1] :]
        for name, given in kwargs.items():
            if not name.startswith("position_embeddings") or given is None:
                continue
            if self._same_positions(index):
                key = id(given)
                if key not in stretch.embeddings:
                    stretch.embeddings[key] = given, _gathered(given, stretch.source)
                kwargs[name] = stretch.embeddings[key][1]
            else:
                lm, positions = self._family.lm, self._positions[index]
                kinds = getattr(lm.config, "layer_types", None)  # which may differ in their RoPE
                of_kind = id(positions), name, kinds and kinds[index]
                if of_kind not in stretch.embeddings:
                    turns = turned(lm, index, name, hidden, positions)
                    stretch.embeddings[of_kind] = turns
                kwargs[name] = stretch.embeddings[of_kind]


def _gathered(embeddings: tuple[Tensor, ...], source: Tensor | None) -> tuple[Tensor, ...]:
    """Cosines and sines [..., B or 1, T, D] at source [B, T']."""
    if source is None:
        return embeddings
    gathered = []
    for x in embeddings:
        index = source.to(x.device)[..., None].expand(*x.shape[:-3], -1, -1, x.shape[-1])
        x = x.expand(*x.shape[:-3], len(source), *x.shape[-2:])
        gathered.append(x.gather(-2, index))
    return tuple(gathered)
