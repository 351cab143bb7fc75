"""What a harness was told about the model, checked before anything is loaded."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from restore_ext import checks
from restore_ext.methods import ALL_TOKENS, METHODS, TOWER_METHODS, named_methods
from restore_ext.reduce import DEFAULT_KEEP, DEFAULT_METHOD

DTYPES = ("auto", "float32", "bfloat16", "float16")
ASPECT_RATIOS = ("processor", "pad")
# The conversations that LLaVA's own evaluation opens with, by the names it has for them.
SYSTEM_PROMPTS = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
}
NEW_TOKENS = 1024  # where neither the task nor the user says


@dataclass(frozen=True)
class Arguments:
    """A checkpoint, how it is asked, and how its visual tokens are reduced.

    pretrained, revision, trust_remote_code, attn_implementation, device_map
                        as transformers' from_pretrained() has them; pretrained may be "pocket"
    device              as torch names it; default: a GPU if there is one
    dtype               of the weights: auto (as the checkpoint has them), float32, ...
    system_prompt       what a conversation opens with: vicuna_v1 (LLaVA-1.5's own), a text file, or
                        the text itself; None: what the task has, if anything
    chat_template       a file with a Jinja template in place of the processor's own
    image_aspect_ratio  "processor": pictures as they are; "pad": made square first, on the
                        processor's mean colour, as LLaVA-1.5's own evaluation does
    max_new_tokens      of an answer to a task that does not say
    reduction           options of attach(); None: nothing is attached
    """

    pretrained: str = "llava-hf/llava-1.5-7b-hf"
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    device_map: str | None = None
    device: str | None = None
    dtype: str = "auto"
    system_prompt: str | None = None
    chat_template: str | None = None
    image_aspect_ratio: str = "processor"
    max_new_tokens: int = NEW_TOKENS
    reduction: Mapping[str, Any] | None = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The device, by name. To ask for a GPU fixes which are visible, so it is not read()'s."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def loading(self) -> dict[str, Any]:
        """The options of from_pretrained() that were given."""
        names = ("revision", "attn_implementation", "device_map")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | ({"trust_remote_code": True} if self.trust_remote_code else {})


OWN = tuple(f.name for f in fields(Arguments) if f.name != "reduction")


def read(given: Mapping[str, Any]) -> Arguments:
    """Arguments by name, those of a model beside all options of attach() (a dict as JSON).

    A budget left out is attach()'s usual 64, where the method takes one. `method=none` attaches
    nothing.

    raises  TypeError, ValueError: naming the argument, what was wanted and what came
    """
    own = {name: value for name, value in given.items() if name in OWN}
    options = {name: value for name, value in given.items() if name not in OWN}
    known = attach_options()
    if unknown := sorted(options.keys() - known.keys()):
        raise TypeError(
            f"there is no argument {', '.join(unknown)}; of the model: {', '.join(OWN)}; of its "
            f"reduction: {', '.join(known)}"
        )
    arguments = Arguments(**own, reduction=_reduction(options))
    checks.require_one_of("dtype", arguments.dtype, DTYPES)
    checks.require_one_of("image_aspect_ratio", arguments.image_aspect_ratio, ASPECT_RATIOS)
    checks.require_flag("trust_remote_code", arguments.trust_remote_code)
    checks.require_count("max_new_tokens", arguments.max_new_tokens)
    return Arguments(
        **{
            **vars(arguments),
            "pretrained": str(arguments.pretrained),
            "system_prompt": _system_prompt(arguments.system_prompt),
            "chat_template": _template(arguments.chat_template),
        }
    )


def attach_options() -> dict[str, Any]:
    """Those of attach(), with their defaults."""
    from restore_ext.hf import attach

    parameters = inspect.signature(attach).parameters
    return {n: p.default for n, p in parameters.items() if n not in ("model", "enabled")}


def _reduction(options: dict[str, Any]) -> dict[str, Any] | None:
    from restore_ext.methods import find_card

    method = options.get("method", DEFAULT_METHOD)
    # A schedule is an argument of its own, with any other method in front.
    checks.require_one_of("method", method, (*named_methods(), ALL_TOKENS))
    if method == ALL_TOKENS:
        if more := sorted(options.keys() - {"method"}):
            raise ValueError(f"{', '.join(more)} must be left out with method {ALL_TOKENS}")
        return None
    reduction = {name: _from_json(name, value) for name, value in options.items()}
    reduction["method"] = method
    if not {"keep", "keep_ratio", "schedule"} & reduction.keys() and find_card(method).budget:
        reduction["keep"] = DEFAULT_KEEP
    _check(method, reduction)
    return reduction


def _from_json(name: str, value: Any) -> Any:
    if name not in ("options", "schedule") or not isinstance(value, str):
        return value
    if name == "schedule" and not value.lstrip().startswith("{"):
        return value  # a file
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a dict in JSON, got {value}: {error}") from error


def _check(method: str, reduction: Mapping[str, Any]) -> None:
    """Refuses now what attach() would refuse once a model is loaded, as far as it needs none."""
    if method not in METHODS | TOWER_METHODS or "schedule" in reduction:
        return
    from restore_ext.hf.settings import make_settings

    make_settings(axes=1, **{**attach_options(), **reduction})


def _system_prompt(value: str | None) -> str | None:
    if value is None or value in SYSTEM_PROMPTS:
        return SYSTEM_PROMPTS.get(value or "")
    return Path(value).read_text().strip() if Path(value).is_file() else str(value)


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    if not Path(file).is_file():
        raise ValueError(f"chat_template must be a file with a Jinja template, got {file}")
    return Path(file).read_text()
