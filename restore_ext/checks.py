"""What `reduce_tokens` refuses. A message says which argument, what was wanted and what came."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restore_ext import _C, archs
from restore_ext.ops import DEVICE_TYPES

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
OP_HEAD_SIZES = range(32, 257, 8)  # of the attention operators


def require_features(name: str, x: Any, batch_shape: Sequence[int] | None = None) -> None:
    """A float tensor [B, N, C], of the given B and N if there are any."""
    require_tensor(name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{name} must have shape [B, N, C] with C >= 1, got {list(x.shape)}")
    if batch_shape is not None and x.shape[:2] != torch.Size(batch_shape):
        B, N = batch_shape
        raise ValueError(f"{name} must have shape [B, N, C] = [{B}, {N}, C], got {list(x.shape)}")


def require_per_token(name: str, x: Any, features: Tensor, *dtypes: torch.dtype) -> None:
    """A tensor [B, N] beside features, of one of the dtypes."""
    require_tensor(name, x)
    if x.dtype not in dtypes:
        known = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {known}, got {x.dtype}")
    wanted = features.shape[:2]
    if x.shape != wanted:
        raise ValueError(f"{name} must have shape [B, N] = {list(wanted)}, got {list(x.shape)}")
    require_device(name, x, features)


def require_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def require_kernels(name: str, device: torch.device) -> None:
    """Something on a device whose operators this build has."""
    if (reason := why_no_kernels(device)) is not None:
        raise NotImplementedError(f"{name} must be on the CPU: {reason}, got {device}")


def why_no_kernels(device: torch.device) -> str | None:
    """Why the operators cannot run on a device; None if they can."""
    if device.type not in DEVICE_TYPES:
        return f"this build of restore_ext has no kernels for {device.type}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        got = ".".join(map(str, capability))
        if capability < archs.OLDEST:
            oldest = ".".join(map(str, archs.OLDEST))
            return f"the kernels need a GPU of compute capability {oldest} or newer, this is {got}"
        if not archs.has_code(_C.cuda_archs, capability):
            return f"this build of restore_ext is for {_C.cuda_archs}, this GPU is {got}"
    return None


def require_device(name: str, x: Tensor, features: Tensor) -> None:
    if x.device != features.device:
        raise ValueError(f"{name} must be on {features.device} like features, got {x.device}")


def require_finite(name: str, x: Tensor, valid: Tensor | None, *, positive: bool = False) -> None:
    """No NaN and no Inf in x [B, N] or [B, N, C], with `positive` nothing <= 0, at valid tokens."""
    good = x.isfinite() & (x > 0) if positive else x.isfinite()
    bad = ~(good.all(-1) if x.dim() == 3 else good)
    if valid is not None:
        bad = bad & valid
    if bad.any():
        wanted = "finite and positive" if positive else "finite"
        first = bad.nonzero()[0].tolist()
        value = x[tuple(first)]
        value = value[~value.isfinite()][0] if x.dim() == 3 else value
        raise ValueError(
            f"{name} must be {wanted} at every valid token, got {value.item()} "
            f"at [b, n] = {first} and {int(bad.sum())} such tokens in all"
        )


def require_count(name: str, value: Any) -> int:
    """A whole number >= 1; a bool is not one."""
    count = require_int(name, value)
    if count < 1:
        raise ValueError(f"{name} must be an int >= 1, got {count}")
    return count


def require_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return operator.index(value)


def require_not_negative(name: str, value: Any) -> int:
    """A whole number >= 0; a bool is not one."""
    number = require_int(name, value)
    if number < 0:
        raise ValueError(f"{name} must be an int >= 0, got {number}")
    return number


def require_share(name: str, value: Any, *, above_zero: bool = False) -> float:
    """A number in [0, 1], or in (0, 1]; a bool is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    if not (0 < value <= 1 if above_zero else 0 <= value <= 1):
        raise ValueError(f"{name} must be in {'(' if above_zero else '['}0, 1], got {value}")
    return float(value)


def require_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def require_one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_budgets(keep: Any, keep_ratio: Any, images: int) -> list[int] | float:
    """What was asked for: tokens to keep, image by image, or the share to keep of every image."""
    if (keep is None) == (keep_ratio is None):
        got = "neither" if keep is None else f"keep={keep!r} and keep_ratio={keep_ratio!r}"
        raise ValueError(f"give exactly one of keep and keep_ratio, got {got}")
    if keep is None:
        return require_share("keep_ratio", keep_ratio, above_zero=True)
    if isinstance(keep, Tensor):
        if keep.dtype == torch.bool or keep.is_floating_point() or keep.is_complex():
            raise TypeError(f"keep must be an int or one per image, got a tensor of {keep.dtype}")
        if keep.dim() > 1:
            raise ValueError(f"keep must have shape [B] = [{images}], got {list(keep.shape)}")
        keep = keep.tolist()
    if not isinstance(keep, (list, tuple)):
        return [require_count("keep", keep)] * images
    if len(keep) != images:
        raise ValueError(f"keep must be one int or one per image, B = {images}, got {len(keep)}")
    return [require_count(f"keep[{b}]", one) for b, one in enumerate(keep)]
