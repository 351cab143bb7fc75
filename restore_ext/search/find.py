"""find_schedule(): how many tokens at which layer, by measurement."""

from collections.abc import Iterable, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from restore_ext import checks
from restore_ext.search.cost import Counts, Shape, flops, kv_bytes, mean_over
from restore_ext.search.found import Found
from restore_ext.search.gsearch import gsearch, most_steps
from restore_ext.search.problem import Problem, share_layers
from restore_ext.search.psigmoid import psigmoid
from restore_ext.search.score import Inputs, Score, first_token

if TYPE_CHECKING:
    from restore_ext.search.trials import Trial

ALGORITHMS = ("psigmoid", "gsearch")
DEFAULT_TRIALS = 40
INSTALL = 'pip install "optuna>=5,<6" tqdm'


def find_schedule(
    model: Any,
    examples: Iterable[tuple[Inputs, Any]],
    score: Score = first_token,
    *,
    algorithm: str = "psigmoid",
    budget: float | None = None,
    latency_ms: float | None = None,
    trials: int = DEFAULT_TRIALS,
    tolerance: float = 0.0,
    scores: str = "attention",
    merge: bool = False,
    options: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Found:
    """Searches how many visual tokens each decoder layer keeps (arXiv 2412.00556).

    model       as for attach(), and not attached: it comes back as it was
    examples    (inputs, label): inputs as a processor returns them, for one row or a left padded
                batch; the label is for `score`. A few hundred rows; never those of a later test
    score       (model, inputs, label) -> a number a row, higher is better, see
                restore_ext.search.first_token, log_likelihood, exact_match
    algorithm   "psigmoid": the best of a family of curves under a budget, its parameters by
                Bayesian optimisation (TPE). "gsearch": layer by layer the fewest tokens that lose
                nothing, by binary search; it takes a tolerance in place of a budget
    budget      psigmoid: multiply-adds, as a share of those with all tokens, in (0, 1], see flops()
    latency_ms  psigmoid, in place of budget: milliseconds of a forward of an example as it comes,
                the vision tower included, measured here
    trials      psigmoid: how many curves to measure, earlier runs included
    tolerance   gsearch: how much lower the mean score may be than with all tokens
    scores      who rates the tokens, merge: see restore_ext.stages.schedule
    options     further arguments of attach(), such as {"restore": False}: they have to be given to
                it again with the schedule
    storage     a file that keeps what was measured (a journal of optuna's): a run that was stopped
                goes on with it. Other examples, options or weights need another one
    seed        of the optimisation: the same seed finds the same, but for latencies
    progress    show a bar

    raises  TypeError, ValueError: an argument that is not as above, a budget that the text alone
            exceeds, examples without images. NotImplementedError: see attach(). RuntimeError: the
            model is attached, or no trial kept to the latency. ImportError: optuna is not installed
    """
    checks.require_one_of("algorithm", algorithm, ALGORITHMS)
    require_limits(algorithm, budget, latency_ms, tolerance)
    checks.require_count("trials", trials)
    checks.require_int("seed", seed)
    try:
        from restore_ext.search.trials import Trials, quiet_optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"find_schedule needs {error.name}: {INSTALL}", name=error.name
        ) from error
    problem = Problem(model, examples, score, scores, merge, options)
    asked = {"psigmoid": {"budget": budget, "latency_ms": latency_ms, "seed": seed}}
    rule = {"algorithm": algorithm, **asked.get(algorithm, {"tolerance": tolerance})}
    with quiet_optuna():
        kept = Trials(storage, {**problem.identity(), **rule})
        search = _Search(problem, kept, latency_ms is not None)
        if algorithm == "gsearch":
            best = search.greedy(tolerance, progress)
        else:
            best = search.curves(budget, latency_ms, trials, seed, progress)
    return search.found(best, rule)


class _Search:
    """One search: measures what was not measured yet, and picks."""

    def __init__(self, problem: Problem, kept: Any, timed: bool) -> None:
        self.problem, self.kept, self.timed = problem, kept, timed
        rows = kept.once("shapes", lambda: [(s.images, s.text) for s in problem.shapes()])
        self.shapes = [Shape(tuple(images), text) for images, text in rows]
        self.n = max(n for shape in self.shapes for n in shape.images)
        config = problem.model.config
        self._flops = mean_over(self.shapes, partial(flops, config))
        self._kv = mean_over(self.shapes, partial(kv_bytes, config))

    @property
    def whole(self) -> "Trial":
        return self.measure((self.n,) * self.problem.depth)

    def layers(self, counts: Counts) -> list[float]:
        return share_layers(counts, self.n)

    def share(self, counts: Counts, cost: str = "_flops") -> float:
        of = getattr(self, cost)
        return of(self.layers(counts)) / of([1.0] * len(counts))

    def measure(self, counts: Counts, params: Mapping[str, float] | None = None) -> "Trial":
        """The trial of these counts, from what is kept if it is there."""
        from restore_ext.search.trials import Trial

        known = self.kept.find(counts)
        if known is not None and params is None:
            return known
        if known is None:
            layers = self.layers(counts)
            costs = {"flops": self.share(counts)}
            if self.timed:
                costs["latency_ms"] = self.problem.latency(layers)
            accuracy = self.problem.accuracy(layers)
        else:
            accuracy, costs = known.accuracy, known.costs
        trial = Trial(counts, accuracy, params or {}, costs)
        self.kept.add(trial)
        return trial

    def greedy(self, tolerance: float, progress: bool) -> "Trial":
        depth, first = self.problem.depth, self.problem.first
        floor = self.whole.accuracy - tolerance
        with _bar(progress, most_steps(depth, first, self.n)) as bar:

            def does(counts: Counts) -> bool:
                trial = self.measure(counts)
                bar.update()
                return trial.accuracy >= floor

            return self.measure(gsearch(depth, first, self.n, does))

    def curves(
        self,
        limit: float | None,
        latency_ms: float | None,
        trials: int,
        seed: int,
        progress: bool,
    ) -> "Trial":
        from restore_ext.search.proposals import Proposals

        budget = self._budget(limit, latency_ms)
        depth, first, n = self.problem.depth, self.problem.first, self.n
        least = (n,) * first + (0,) * (depth - first)
        if not budget.fits(least):
            name, got = ("budget", limit) if latency_ms is None else ("latency_ms", latency_ms)
            raise ValueError(
                f"{name} must be at least {ceil(1e4 * budget.cost(least)) / 1e4}, what is left "
                f"without visual tokens behind layer {first - 1}, got {got}"
            )
        self.measure((n,) * depth)
        done = [trial for trial in self.kept.all if trial.params]
        proposals = Proposals(seed, [(trial.params, trial.accuracy) for trial in done])
        with _bar(progress, trials, len(done)) as bar:
            while len(done) < trials:
                budget.learn(done)
                params = proposals.ask()
                done.append(self.measure(psigmoid(depth, first, n, params, budget.fits), params))
                proposals.tell(done[-1].accuracy)
                bar.update()
        allowed = [trial for trial in done if budget.allows(trial)]
        if not allowed:
            least_ms = min(trial.costs["latency_ms"] for trial in done)
            raise RuntimeError(
                f"none of {len(done)} schedules took at most {latency_ms} ms, the fastest "
                f"{least_ms:.3g} ms: allow more, or more trials"
            )
        return max(allowed, key=lambda trial: (trial.accuracy, -trial.costs["flops"]))

    def _budget(self, limit: float | None, latency_ms: float | None) -> Any:
        from restore_ext.search.budget import FlopsBudget, LatencyBudget, knot_counts

        if latency_ms is None:
            assert limit is not None
            return FlopsBudget(limit, self.share)
        first, depth = self.problem.first, self.problem.depth

        def clock() -> list[tuple[int, float]]:
            schedules = {k: (self.n,) * first + (k,) * (depth - first) for k in knot_counts(self.n)}
            return [(k, self.problem.latency(self.layers(c))) for k, c in schedules.items()]

        return LatencyBudget(latency_ms, first, self.kept.once("knots", clock))

    def found(self, best: "Trial", rule: Mapping[str, Any]) -> Found:
        costs = {"flops": self.share(best.counts), "kv_bytes": self.share(best.counts, "_kv")}
        shown: dict[str, Any] = {f"share of {n}": round(v, 4) for n, v in costs.items()}
        if self.timed:
            shown["latency"] = f"{best.costs['latency_ms']:.3f} ms"
        measured = len({trial.counts for trial in self.kept.all})
        about = {
            "found by": "restore_ext.search.find_schedule",
            **{name: value for name, value in rule.items() if value is not None},
            "options": self.problem.options,
            "tokens": list(best.counts),
            "accuracy": round(best.accuracy, 4),
            "accuracy with all tokens": round(self.whole.accuracy, 4),
            "score": self.problem.score_name,
            "rows": len(self.shapes),
            "schedules measured": measured,
            **shown,
            "model": type(self.problem.model).__name__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        schedule = {**self.problem.schedule(self.layers(best.counts)), "about": about}
        return Found(
            schedule,
            list(best.counts),
            best.accuracy,
            self.whole.accuracy,
            costs["flops"],
            costs["kv_bytes"],
            measured,
        )


def require_limits(algorithm: str, budget: Any, latency_ms: Any, tolerance: Any) -> None:
    """Raises ValueError for limits that the algorithm does not take, or out of range."""
    for name, value in (("latency_ms", latency_ms), ("tolerance", tolerance)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and (not number or not value >= 0):
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    given = {"budget": budget, "latency_ms": latency_ms}
    if algorithm == "gsearch":
        if said := {n: v for n, v in given.items() if v is not None}:
            raise ValueError(f"gsearch takes a tolerance, not a budget or latency_ms, got {said}")
        return
    if tolerance:
        raise ValueError(f"psigmoid takes a budget or latency_ms, not a tolerance, got {tolerance}")
    if (budget is None) == (latency_ms is None):
        raise ValueError(f"psigmoid needs one of budget and latency_ms, got {given}")
    if budget is not None:
        checks.require_share("budget", budget, above_zero=True)


def _bar(progress: bool, total: int, initial: int = 0) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit="schedule", disable=not progress)
