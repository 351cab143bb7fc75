"""What the tests of the transformers hook share: running a model, and what it should say."""

from functools import cache

import pytest
import torch
from naive import Naive, Setting, Tokens
from torch import Tensor

import restore_ext
from restore_ext.testing.models import (
    FAMILIES,
    RAGGED,
    VERSION,
    Picture,
    make_inputs,
    single_row,
    tiny_model,
)

NEW = 6  # tokens per answer
RATIO = 0.3  # 64 -> 19, 24 -> 7, 16 -> 5, 15 -> 4 visual tokens
BACKENDS = ("mask", "op")
TOLERANCE = 1e-5  # of the largest logit, in float32

each_family = pytest.mark.parametrize("family", FAMILIES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@cache
def stock(family: str, seed: int = 0):
    """The model that nobody attaches anything to: what is right when nothing is reduced."""
    return tiny_model(family, seed=seed)


def fresh(family: str, attn: str = "sdpa"):
    """A model that has run once: transformers installs things of its own on the first forward."""
    model = tiny_model(family, attn=attn)
    forward(model, make_inputs(family))
    return model


def beam_rows(family: str) -> list:
    """A ragged batch for beams. Before 5.18 stock LLaVA hands the beams of a row with two images
    the first one twice, so there every row has one."""
    mixed = family == "llava" and VERSION < (5, 18)
    return [(5, Picture(), 7), (9, Picture(), 4)] if mixed else RAGGED


@cache
def naive(family: str, dtype: torch.dtype = torch.float64) -> Naive:
    return Naive(stock(family), dtype)


def with_defaults(options: dict) -> dict:
    """The tests' own: a budget, and in layer 0 uniform sizes, so that it differs from others."""
    budget = {} if "keep" in options else {"keep_ratio": RATIO}
    return {"layer0": "uniform", **budget, **options}


def attach(model, **options):
    return restore_ext.attach(model, **with_defaults(options))


def generate(model, inputs: dict, **options):
    """generate(), greedy, with scores; the inputs are copied, for generate pops some of them."""
    copies = {name: value.clone() for name, value in inputs.items()}
    asked = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(**copies, **{**asked, **options})


def answers(out, inputs: dict) -> Tensor:
    """[R, new] the generated tokens."""
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def logits(out) -> Tensor:
    """[R, new, V] the raw logits of each generated token."""
    return torch.stack(out.logits, 1)


@torch.no_grad()
def forward(model, inputs: dict, **options) -> Tensor:
    return model(**inputs, **options).logits


def assert_close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    """Same shape, and no element further apart than `tolerance` of the largest one wanted."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    scale = want.abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.2e} at scale {scale:.2e}"


def reduced_row(family: str, inputs: dict, handle, row: int, setting: Setting) -> Tokens:
    """The prompt of one row as the handle's plan reduced it, in the naive model's terms."""
    full = naive(family).prompt(single_row(inputs, row))
    plan = handle.last.plan
    copies = len(plan.valid) // len(inputs["input_ids"])  # beams, or samples, of a row
    return naive(family).reduced(full, plan, row * copies, setting)


def expected(
    family: str, inputs: dict, handle, tokens: Tensor, row: int = 0, **setting: bool
) -> Tensor:
    """[new, V] the logits the naive model gives `tokens` ([new]) of one row."""
    how = Setting(**setting)
    prompt = reduced_row(family, inputs, handle, row, how)
    return naive(family).logits(prompt, tokens.tolist(), how)


def assert_is_naive(family: str, inputs: dict, handle, out, **setting: bool) -> None:
    """Every row of a generate() output has the logits of the naive model."""
    assert handle.last.plan.valid.shape[1] < inputs["input_ids"].shape[1]
    for row, tokens in enumerate(answers(out, inputs)):
        want = expected(family, inputs, handle, tokens, row, **setting)
        assert_close(logits(out)[row], want)


def step(model, token: Tensor, past, logical: int, **options):
    """One forward of a hand-written decode loop: token [B, q] on a cache of `logical` tokens."""
    if VERSION < (5, 0):  # Qwen2.5-VL of 4.57 counts from zero without it
        options["cache_position"] = torch.arange(logical, logical + token.shape[1])
    with torch.no_grad():
        return model(input_ids=token, past_key_values=past, use_cache=True, **options)


def fingerprint(model) -> dict:
    """All that a hook could leave behind in a model: classes, attributes, hooks, settings."""
    state = {}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
        state[name] = (type(module), sorted(vars(module)), hooks)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        state[type(config)] = (config._attn_implementation, sorted(vars(config)))
    state["generation"] = str(model.generation_config)
    return state
