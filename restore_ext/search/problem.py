"""A model, labelled examples, and what schedules do to the answers."""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from restore_ext.checks import require_flag, require_one_of
from restore_ext.hf.families import Family, find_family
from restore_ext.hf.handle import attach, handle_of
from restore_ext.hf.visuals import kinds_of, pixels_of
from restore_ext.search.cost import Counts, Shape
from restore_ext.search.score import Inputs, Score
from restore_ext.stages.stage import SCORES

TIMED = 4  # examples that a latency is the median of
NOT_OPTIONS = {
    *("method", "options", "keep", "keep_ratio", "budget", "schedule", "enabled"),
    "min_visual_tokens",  # what it spares, a schedule's FLOPs would not say
}


class Problem:
    """What is searched for, checked before any work is done; see find_schedule().

    depth  decoder layers; first  the first that can be cut
    """

    def __init__(
        self,
        model: Any,
        examples: Iterable[tuple[Inputs, Any]],
        score: Score,
        scores: str,
        merge: bool,
        options: Mapping[str, Any] | None,
    ) -> None:
        family = find_family(model)
        if handle_of(model) is not None:
            raise RuntimeError("model must not be attached: detach it first")
        if not callable(score):
            raise TypeError(f"score must be a function of (model, inputs, label), got {score!r}")
        require_one_of("scores", scores, SCORES)
        require_flag("merge", merge)
        self.model, self.score = model, score
        self.scores, self.merge, self.options = scores, merge, dict(options or {})
        if taken := sorted(NOT_OPTIONS & self.options.keys()):
            raise ValueError(f"options must leave what is reduced to the search, got {taken}")
        self.depth, self.first = len(family.lm.layers), family.first_cut
        self.examples = _checked(examples, family)
        with self.attached([1.0] * self.first + [0.5] * (self.depth - self.first)):
            pass  # what attach() refuses, it refuses now

    @property
    def score_name(self) -> str:
        return getattr(self.score, "__name__", type(self.score).__name__)

    def schedule(self, layers: Sequence[float]) -> dict[str, Any]:
        """What attach() takes."""
        return {"layers": list(layers), "scores": self.scores, "merge": self.merge}

    def attached(self, layers: Sequence[float]) -> Any:
        """A context in which the model keeps these shares; all of them: it is as it was."""
        if min(layers) == 1:
            return nullcontext()
        return attach(self.model, schedule=self.schedule(layers), **self.options)

    @torch.no_grad()
    def shapes(self) -> list[Shape]:
        """The visual tokens and the others of every row, by one forward an example."""
        rows: list[Shape] = []
        probe = [1.0] * (self.depth - 1) + [0.0]
        for i, (inputs, _) in enumerate(self.examples):
            with self.attached(probe) as handle:
                self.model(**inputs, logits_to_keep=1, use_cache=False)
                report = handle.last
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            lengths = (torch.ones_like(ids) if mask is None else mask).sum(1).tolist()
            images: list[list[int]] = [[] for _ in lengths]
            for image in report.images if report is not None else ():
                images[image.row].append(image.tokens_before)
            if not all(images):
                raise ValueError(f"examples[{i}] must have an image in every row, got {images}")
            rows += [
                Shape(tuple(own), int(length) - sum(own))
                for own, length in zip(images, lengths, strict=True)
            ]
        return rows

    @torch.no_grad()
    def accuracy(self, layers: Sequence[float]) -> float:
        """The mean score of all rows under these shares."""
        values: list[float] = []
        with self.attached(layers):
            for inputs, label in self.examples:
                given = self.score(self.model, inputs, label)
                numbers = torch.as_tensor(given, dtype=torch.float64).reshape(-1).tolist()
                if len(numbers) != len(inputs["input_ids"]):
                    raise ValueError(
                        f"score must return {len(inputs['input_ids'])} numbers, one a row, got "
                        f"{given!r}"
                    )
                values += numbers
        return sum(values) / len(values)

    @torch.no_grad()
    def latency(self, layers: Sequence[float], repeats: int = 3) -> float:
        """Milliseconds of one forward of an example, vision tower included: the median."""
        times = []
        with self.attached(layers):
            for inputs, _ in self.examples[:TIMED]:
                self._forward(inputs)  # to warm up
                times += [self._forward(inputs) for _ in range(repeats)]
        return median(times)

    def _forward(self, inputs: Inputs) -> float:
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.model.device)
        start = time.perf_counter()
        self.model(**inputs, logits_to_keep=1, use_cache=True)
        if cuda:
            torch.cuda.synchronize(self.model.device)
        return 1e3 * (time.perf_counter() - start)

    def identity(self) -> dict[str, Any]:
        """What measurements depend on, as JSON: another run's are of use if it is the same."""
        return {
            "model": _digest_of_model(self.model),
            "examples": _digest_of(self.examples),
            "score": self.score_name,
            "scores": self.scores,
            "merge": self.merge,
            "options": self.options,
        }


def share_layers(counts: Counts, n: int) -> list[float]:
    """Counts of n tokens as shares, which attach() rounds back to the same counts."""
    return [round(count / n, 6) for count in counts]


def _checked(examples: Iterable[tuple[Inputs, Any]], family: Family) -> list[tuple[Inputs, Any]]:
    given = list(examples)
    if not given:
        raise ValueError("examples must be at least one (inputs, label), got none")
    for i, example in enumerate(given):
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TypeError(f"examples[{i}] must be (inputs, label), got {type(example).__name__}")
        inputs = example[0]
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"examples[{i}] must have a dict of model inputs first, got {type(inputs).__name__}"
            )
        if not kinds_of(family, inputs) or inputs.get("input_ids") is None:
            raise ValueError(
                f"examples[{i}] must have input_ids and {pixels_of(family)}, got {sorted(inputs)}"
            )
    return [(inputs, label) for inputs, label in given]


def _digest_of(examples: Sequence[tuple[Inputs, Any]]) -> str:
    total = hashlib.sha256()
    for inputs, label in examples:
        for name in sorted(inputs):
            total.update(name.encode())
            _add(total, inputs[name])
        _add(total, label)
    return total.hexdigest()[:16]


def _digest_of_model(model: Any) -> str:
    """Of its class, and of the numbers that no quantisation touches: norms, biases, embeddings."""
    total = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        total.update(f"{name} {list(parameter.shape)}".encode())
        if parameter.dim() == 1 and parameter.is_floating_point():
            _add(total, parameter.detach())
    _add(total, model.get_input_embeddings().weight.detach()[:64])
    return total.hexdigest()[:16]


def _add(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        total.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    else:
        total.update(repr(value).encode())
