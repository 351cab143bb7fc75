"""What was measured, kept in an optuna study: in memory, or in a journal that outlives the run."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from restore_ext.search.cost import Counts
from restore_ext.search.proposals import SPACES

STUDY = "restore_ext"


@dataclass(frozen=True)
class Trial:
    """A schedule that was measured.

    params  the parameters it follows from, by name
    costs   what it takes: "flops" as a share of the whole model's; "latency_ms" if it was measured
    """

    counts: Counts
    accuracy: float
    params: Mapping[str, float]
    costs: Mapping[str, float]


class Trials:
    """Measures each schedule once, this run and those before it with the same storage.

    identity  what a measurement depends on, as JSON
    raises    ValueError: the storage is of another search, or no journal of optuna's
    """

    def __init__(self, storage: str | Path | None, identity: Mapping[str, Any]) -> None:
        self._study = _open(storage)
        asked = json.loads(json.dumps(identity, default=repr))
        known = self._study.user_attrs.get("identity")
        if known is None:
            self._study.set_user_attr("identity", asked)
        elif known != asked:
            names = sorted(n for n in {*known, *asked} if known.get(n) != asked.get(n))
            was, now = ({n: said.get(n) for n in names} for said in (known, asked))
            raise ValueError(
                f"storage must be of the same search, got {storage} of {was}, not {now}"
            )
        self.all: list[Trial] = [_read(trial) for trial in self._study.trials]
        self._known = {trial.counts: trial for trial in self.all}

    def find(self, counts: Counts) -> Trial | None:
        return self._known.get(counts)

    def add(self, trial: Trial) -> None:
        """Keeps a measurement."""
        made = optuna.trial.create_trial(
            params=dict(trial.params),
            distributions={name: SPACES[name] for name in trial.params},
            value=trial.accuracy,
            user_attrs={"counts": list(trial.counts), "costs": dict(trial.costs)},
        )
        self._study.add_trial(made)
        self.all.append(trial)
        self._known.setdefault(trial.counts, trial)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What make() returned the first time, as JSON."""
        if name not in self._study.user_attrs:
            self._study.set_user_attr(name, make())
        return self._study.user_attrs[name]


def _read(trial: optuna.trial.FrozenTrial) -> Trial:
    assert trial.value is not None
    kept = trial.user_attrs
    return Trial(tuple(kept["counts"]), trial.value, trial.params, kept["costs"])


def _open(storage: str | Path | None) -> optuna.Study:
    if storage is None:
        return optuna.create_study(storage=InMemoryStorage(), direction="maximize")
    path = Path(storage)
    if not path.parent.is_dir():
        raise ValueError(f"storage must be a file in a folder that exists, got {storage}")
    try:
        journal = JournalStorage(JournalFileBackend(str(path)))
        return optuna.create_study(
            storage=journal, study_name=STUDY, direction="maximize", load_if_exists=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"storage must be a journal of optuna's, got {storage}: {error}"
        ) from error


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without its lines on studies that are made."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
