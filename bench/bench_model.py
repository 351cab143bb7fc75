"""A model of LLaVA's shape with random weights: all visual tokens against the few that are kept.

"1 new" is a forward of the prompt, picture and all; "33 new" a greedy generation, so the difference
of the two is 32 decoding steps. Weights are random: the times are a model's, the answers nobody's.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import restore_ext
from bench.harness import Gpu, Peer, main
from bench.provider import Given
from restore_ext.testing.models import IMAGE, PATCH, TEXT

VOCABULARY: int = TEXT["vocab_size"]
# Relative error of the logits against the same reduction with a mask, after all layers.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Shape:
    """By default small enough for a CPU; LLaVA is LLaVA-1.5 7B but for its vocabulary."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    inner: int = 256
    side: int = 8  # of the picture, in patches
    vision_layers: int = 2
    vision_hidden: int = 64


LLAVA = Shape(32, 4096, 32, 11008, 24, 24, 1024)
SHORT = Shape(8, 4096, 32, 11008, 24, 24, 1024)  # where the other does not fit


@dataclass(frozen=True)
class Case:
    shape: Shape = Shape()
    B: int = 1
    keep: int = 16
    new: int = 1

    def __str__(self) -> str:
        s = self.shape
        tokens = f"{s.side**2} visual tokens, {self.keep} kept"
        return f"B={self.B} {s.layers} layers of {s.hidden}, {tokens}, {self.new} new"

    def arguments(self, device: str, dtype: torch.dtype) -> Given:
        g = torch.Generator().manual_seed(0)
        text = torch.randint(3, VOCABULARY - 4, (self.B, 55), generator=g)
        picture = torch.full((self.B, self.shape.side**2), IMAGE)
        ids = torch.cat([text[:, :35], picture, text[:, 35:]], 1).to(device)
        side = self.shape.side * PATCH
        pixels = torch.randn(self.B, 3, side, side, generator=g).to(device, dtype)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
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


def build(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_hidden // 64 or 1,
        image_size=shape.side * PATCH,
        patch_size=PATCH,
        projection_dim=shape.vision_hidden,
    )
    text = TEXT | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
    }
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=shape.side**2,
    )
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    g = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1 if "embed" in name else 1 / math.sqrt(p[0].numel()), generator=g)
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = TEXT["pad_token_id"]
    return model.eval()


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
