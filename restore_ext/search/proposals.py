"""Which curve to measure next."""

from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import FloatDistribution

from restore_ext.search.psigmoid import PARAMETERS, STARTS

SPACES = {n: FloatDistribution(low, high, log=log) for n, (low, high, log) in PARAMETERS.items()}


class Proposals:
    """The starts, then random points, then what optuna's TPE makes of the trials so far.

    done  the (parameters, accuracy) of trials of earlier runs, in their order
    """

    def __init__(self, seed: int, done: Sequence[tuple[Mapping[str, float], float]]) -> None:
        self._seed, self._number = seed, len(done)
        self._study = optuna.create_study(direction="maximize")
        for params, accuracy in done:
            made = optuna.trial.create_trial(
                params=dict(params), distributions=dict(SPACES), value=accuracy
            )
            self._study.add_trial(made)

    def ask(self) -> dict[str, float]:
        """The parameters of the next trial; tell() has to follow."""
        # Anew for each: a run that was stopped goes on as if it had not been.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=self._seed + self._number, n_startup_trials=2 * len(STARTS), multivariate=True
        )
        if self._number < len(STARTS):
            self._study.enqueue_trial(STARTS[self._number])
        self._asked = self._study.ask(dict(SPACES))
        return self._asked.params

    def tell(self, accuracy: float) -> None:
        self._study.tell(self._asked, accuracy)
        self._number += 1
