"""Methods that act in front of the projector: the tower itself gives fewer tokens of a picture.

The model counts on one feature for every placeholder, so each token that is left is handed on once
for every patch it stands for, and the sequence is cut behind the projector as for other methods.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from restore_ext import profiling
from restore_ext.hf.images import for_operators, one_image
from restore_ext.hf.patches import Patches
from restore_ext.hf.settings import Settings
from restore_ext.hf.vision import recorded
from restore_ext.methods.downsample import cells, smaller_grid
from restore_ext.reduction import Reduction


def watch_smaller_pictures(
    patches: Patches, tower: Any, projector: nn.Module, settings: Settings
) -> None:
    """Makes pictures smaller on their way into `tower`, a ViT that interpolates its positions."""
    side: int = tower.config.patch_size

    @profiling.range("merge_pixels")
    def shrink(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (record := recorded(settings)) is None:
            return None
        pixels = args[0] if args else kwargs["pixel_values"]
        rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
        (budget,) = settings.budgets([rows * columns], [0], [0])
        if budget >= rows * columns:
            return None
        height, width = smaller_grid(rows, columns, budget)
        group = cells(rows, columns, height, width, pixels.device)
        record.joined, record.left = group.expand(len(pixels), -1), height * width
        # Antialiased, as a processor does it; normalised values are as good as raw ones.
        smaller = interpolate(
            pixels.float(), (height * side, width * side), mode="bicubic", antialias=True
        ).to(pixels.dtype)
        given = {**kwargs, "interpolate_pos_encoding": True}
        if args:
            return (smaller, *args[1:]), given
        return args, {**given, "pixel_values": smaller}

    patches.hook(tower, "forward_pre_hook", shrink, with_kwargs=True)
    watch_fewer_tokens(patches, projector, settings)


def watch_fewer_tokens(patches: Patches, projector: nn.Module, settings: Settings) -> None:
    """Hands every token that `projector` returns on for all that record.joined says it stands for,
    and records what that makes of the pictures."""

    @profiling.range("merge_patches")
    def expand(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        record = recorded(settings)
        if record is None or record.joined is None:
            return None
        B, n, C = output.shape
        if n != record.left:
            raise NotImplementedError(
                f"method {settings.method} needs a vision tower with one feature for every patch, "
                f"got {n} features of {record.left} patches"
            )
        group = record.joined
        record.reduced += [_reduction(output[b : b + 1], group[b : b + 1]) for b in range(B)]
        return output.gather(1, group[..., None].expand(-1, -1, C))

    patches.hook(projector, "forward_hook", expand)


def _reduction(tokens: Tensor, group: Tensor) -> Reduction:
    """Of one picture, to tokens [1, M, C], by group [1, N]."""
    x = for_operators(tokens)
    return one_image(Reduction.of_tokens(x, group.to(x.device)), 0, tokens[0])
