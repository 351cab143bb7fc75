"""The methods that cut inside the language model: which tokens leave, and before which layer."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from restore_ext.checks import require_count, require_share
from restore_ext.stages.adsc_style import ADSC_STYLE
from restore_ext.stages.fastv import FASTV
from restore_ext.stages.pyramiddrop import PYRAMIDDROP
from restore_ext.stages.schedule import SCHEDULE
from restore_ext.stages.sparsevlm import SPARSEVLM
from restore_ext.stages.stage import Candidates, Request, Stage, StageMethod
from restore_ext.stages.vtw import VTW

__all__ = [
    "STAGE_METHODS",
    "Candidates",
    "Request",
    "Stage",
    "StageMethod",
    "make_stages",
    "read_schedule",
]

STAGE_METHODS: dict[str, StageMethod] = {
    "fastv": FASTV,
    "pyramiddrop": PYRAMIDDROP,
    "sparsevlm": SPARSEVLM,
    "vtw": VTW,
    "adsc_style": ADSC_STYLE,
    "schedule": SCHEDULE,
}


def make_stages(name: Any, request: Request, options: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a method for a model of request.depth layers.

    raises  ValueError: an unknown name, a budget the method does not take, an option out of range,
            a layer that the model does not have
            TypeError: an option the method does not have, or one of the wrong type
    """
    if not isinstance(name, str) or name not in STAGE_METHODS:
        known = ", ".join(STAGE_METHODS)
        raise ValueError(f"schedule: method must be one of {known}, got {name!r}")
    method = STAGE_METHODS[name]
    request = replace(request, **_budget(name, method, request))
    for option, value in options.items():
        if option not in method.options:
            known = ", ".join(method.options)
            raise TypeError(f"method {name} has no option {option!r}; its options are: {known}")
        if value is not None:
            method.options[option](option, value)
    stages = method.make(request, **{n: v for n, v in options.items() if v is not None})
    for stage in stages:
        if not 1 <= stage.layer < request.depth:
            raise ValueError(
                f"method {name} must cut at a layer in 1..{request.depth - 1} of this model, got "
                f"layer {stage.layer}"
            )
    return stages


def _budget(name: str, method: StageMethod, request: Request) -> dict[str, Any]:
    keep, keep_ratio = request.keep, request.keep_ratio
    if keep is None and keep_ratio is None:
        return {}
    if not method.budget:
        known = ", ".join(method.options)
        raise ValueError(f"method {name} takes no keep or keep_ratio; its options are: {known}")
    if keep is None:
        return {"keep_ratio": require_share("keep_ratio", keep_ratio, above_zero=True)}
    if keep_ratio is not None:
        raise ValueError(f"give one of keep and keep_ratio, got keep={keep!r} and {keep_ratio!r}")
    if isinstance(keep, (list, tuple, Tensor)):
        raise TypeError(
            f"keep must be one int for method {name}, which cuts inside the language model, got "
            f"{keep!r}"
        )
    return {"keep": require_count("keep", keep)}


def read_schedule(schedule: Any) -> dict[str, Any]:
    """A schedule as a dict: given as one, or as the path of a JSON file that holds one.

    {"layers": [...], ...} with the options of `stages.schedule`, or {"method": name, "keep": ... or
    "keep_ratio": ..., ...} with those of any method here. "about" may hold what else there is to
    say, and is not read.
    """
    if isinstance(schedule, (str, Path)):
        try:
            schedule = json.loads(Path(schedule).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"schedule must be a JSON file, got {schedule}: {error}") from error
    if not isinstance(schedule, Mapping):
        raise TypeError(f"schedule must be a dict or the path of a JSON file, got {schedule!r}")
    if "layers" not in schedule and "method" not in schedule:
        raise ValueError(f"schedule must have 'layers' or 'method', got {sorted(schedule)}")
    return {"method": "schedule", **{k: v for k, v in schedule.items() if k != "about"}}
