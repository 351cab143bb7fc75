"""Models on several devices: by tensor parallelism, which divides the heads of a layer over ranks,
or by accelerate (`device_map`), which has modules here and there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restore_ext.hf.patches import Patches

ENCODED = "mm_encoder_outputs"


@dataclass(frozen=True)
class Heads:
    """The query heads of a model's layers, which may be divided over ranks."""

    total: int
    group: Any  # the ProcessGroup of those ranks; None: unknown, or there are none

    @staticmethod
    def of(model: nn.Module, attention: nn.Module, total: int) -> "Heads":
        """From where transformers notes it, else from how torch has distributed the weights."""
        mesh = getattr(model, "_device_mesh", None)
        if mesh is None:
            mesh = getattr(getattr(attention, "q_proj", None), "weight", None)
            mesh = getattr(mesh, "device_mesh", None)
        if mesh is None or mesh.size() == 1:
            return Heads(total, None)
        if mesh.ndim == 1:
            return Heads(total, mesh.get_group())
        named = "tp" in (mesh.mesh_dim_names or ())
        return Heads(total, mesh.get_group("tp") if named else None)

    def mean(self, scores: Tensor, here: int) -> Tensor:
        """Scores averaged over all heads, the same on every rank, from those averaged over the
        `here` heads of this one. Asks the host nothing."""
        if here == self.total:
            return scores
        if self.group is None:
            raise NotImplementedError(
                f"model: the heads must be divided by transformers' tensor parallelism or along a "
                f"mesh dimension named 'tp', so that all ranks can rate tokens alike; here are "
                f"{here} of {self.total} heads, and the others are on unknown ranks"
            )
        scores = scores * (here / self.total)
        dist.all_reduce(scores, group=self.group)
        return scores


def devices(model: nn.Module) -> list[torch.device]:
    """Where a model runs: where its parameters are and, for those that accelerate has put on disk
    or in main memory, where it takes them to."""
    found = [p.device for p in model.parameters() if p.device.type != "meta"]
    for module in model.modules():
        for hook in _dispatched(module):
            if hook.offload and hook.execution_device is not None:
                found.append(torch.device(hook.execution_device))
    return list(dict.fromkeys(found))


def keep_encoded(patches: Patches, model: nn.Module) -> None:
    """Has accelerate hand on the encoded images that generate() brings as they are.

    It would copy them to the first device and, whether or not they are there, put them into a new
    object, while what was seen of the images is tied to the one they came in. The model sends the
    features to where it needs them.
    """
    for hook in _dispatched(model):
        keys = hook.skip_keys or []
        keys = [keys] if isinstance(keys, str) else list(keys)
        patches.set(hook, "skip_keys", [*keys, ENCODED])


def _dispatched(module: nn.Module) -> Iterator[Any]:
    """The hooks by which accelerate moves what a module is given, and its parameters."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if hasattr(one, "execution_device") and hasattr(one, "skip_keys"):
            yield one
