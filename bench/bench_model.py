"""A model of LLaVA's shape with random weights: all visual tokens against the few that are kept.

"1 new" is a forward of the prompt, picture and all; "33 new" a greedy generation, so the difference
of the two is 32 decoding steps. Weights are random: the times are a model's, the answers nobody's.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import restore_ext
from bench.harness import Gpu, Peer, main
from bench.provider import Given
from restore_ext.bench.random_llava import Shape, build, prompt
from restore_ext.testing.zoo import VOCABULARY

# Relative error of the logits against the same reduction with a mask, after all layers.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


TINY = Shape()
LLAVA = Shape(32, 4096, 32, 11008, 24, 24, 1024)
SHORT = Shape(8, 4096, 32, 11008, 24, 24, 1024)  # where the other does not fit


@dataclass(frozen=True)
class Case:
    shape: Shape = TINY
    B: int = 1
    keep: int = 16
    new: int = 1

    def __str__(self) -> str:
        s = self.shape
        tokens = f"{s.side**2} visual tokens, {self.keep} kept"
        return f"B={self.B} {s.layers} layers of {s.hidden}, {tokens}, {self.new} new"

    def arguments(self, device: str, dtype: torch.dtype) -> Given:
        inputs = prompt(self.shape, self.B, device, dtype)
        ways = models(self.shape, self.keep, device, dtype)
        return {"inputs": inputs, "ways": ways, "way": "restore_ext", "new": self.new}


@functools.lru_cache(maxsize=1)
def models(shape: Shape, keep: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One set of weights in a stock model, in a hooked one, and in one hooked through a mask."""
    model = build(shape, device, dtype)
    ways = {"all tokens": model}
    for name, backend in (("a mask", "mask"), ("restore_ext", "op")):
        shared = {id(p): p for p in [*model.parameters(), *model.buffers()]}
        ways[name] = copy.deepcopy(model, shared)
        restore_ext.attach(ways[name], method="divprune", keep=keep, backend=backend)
    return ways


@torch.no_grad()
def run(inputs: dict[str, Tensor], ways: dict[str, Any], way: str, new: int) -> Tensor:
    model = ways[way]
    if new == 1:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
    return model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)


def the_way(name: str) -> Peer:
    def make(**given: Any) -> Callable[[], Tensor]:
        return functools.partial(run, **given)

    return Peer(make, lambda given: given | {"way": name})


def check(out: Tensor, inputs: dict[str, Tensor], ways: Any, way: str, new: int) -> float | None:
    B, length = inputs["input_ids"].shape
    if new > 1:
        assert out.shape == (B, length + new), f"{list(out.shape)} tokens came out"
        return None
    assert out.shape == (B, VOCABULARY) and out.isfinite().all()
    if way == "all tokens":
        return None
    wanted = run(inputs, ways, "a mask", new).double()
    error = ((out.double() - wanted).norm() / wanted.norm()).item()
    assert error <= TOLERANCE[out.dtype], f"the relative error is {error:.1e}"
    return error


def on_gpu() -> list[Case]:
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    shape = LLAVA if free > 24 << 30 else SHORT
    return [Case(shape, B, 64, new) for B in (1, 8) for new in (1, 33)]


if __name__ == "__main__":
    providers = {name: the_way(name) for name in ("all tokens", "a mask", "restore_ext")}
    gpu = Gpu(on_gpu(), [Case(), Case(new=2)])
    main("model", [Case(), Case(new=3)], providers, check, ("float32",), gpu=gpu)
