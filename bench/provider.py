"""What a bench can put side by side: plain functions, and peers that need more words."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

Given = dict[str, Any]
OURS = "restore_ext"  # its name among the providers of a bench
PARTIAL = 75  # a bench's exit status: the time was over before the cases were


class Missing(Exception):
    """What a provider needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Peer:
    """A provider that prepares something before the clock starts, or solves another problem.

    make     the arguments -> the call that is timed; may raise Missing
    problem  what it is given of the arguments, e.g. without the bias; its answer is checked by that
    exact    False: it computes in half precision what we compute in float32, so that its picks may
             differ. That is noted, and it is timed all the same.
    around   a context to make, call and capture it in, entered while no clock runs
    says     the arguments -> what is noted in its rows beside the numbers
    captured False: it waits for the device, so that no CUDA graph can be made of it
    """

    make: Callable[..., Callable[[], Any]]
    problem: Callable[[Given], Given] = lambda given: given
    exact: bool = True
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    captured: bool = True
    says: Callable[[Given], str] = lambda given: ""


Provider = Callable[..., Any] | Peer


def as_peer(provider: Provider) -> Peer:
    """A plain function gets its arguments anew in every call."""
    if isinstance(provider, Peer):
        return provider
    return Peer(lambda **given: partial(provider, **given))


def need_gpu(tensor: torch.Tensor) -> None:
    if not tensor.is_cuda:
        raise Missing("needs a GPU")


def need(module: str, tensor: torch.Tensor) -> Any:
    """An optional module that runs on GPUs only."""
    need_gpu(tensor)
    try:
        return import_module(module)
    except ImportError as error:
        raise Missing(f"{module} is not installed ({error})") from error


def compiled(fn: Callable[..., Any], device: torch.device, **options: Any) -> Callable[..., Any]:
    """torch.compile on a GPU. Elsewhere fn itself: a rehearsal has no time for compilers."""
    if device.type != "cuda":
        return fn
    import_module(
        "torch._dynamo"
    ).config.recompile_limit = 256  # past it, what we would time is eager code
    return torch.compile(fn, dynamic=False, **options)
