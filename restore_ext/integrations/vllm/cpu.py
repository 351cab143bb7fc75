"""vLLM's CPU runner asks a model for positions of its own, as the GPU's does."""

from typing import Any

from vllm.platforms import current_platform

from restore_ext.integrations.vllm.model import Reduced

_FLAG = "is_multimodal_pruning_enabled"


def let_runner_ask() -> None:
    """The GPU's runner sets a flag when it has loaded a model that prunes; the CPU's has its own
    way to load, which leaves the flag as it was (vLLM 0.32). From here on it is up for models of
    ours, in this process."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def get(runner: Any) -> bool:
        return runner.__dict__[_FLAG] or isinstance(getattr(runner, "model", None), Reduced)

    def put(runner: Any, value: bool) -> None:
        runner.__dict__[_FLAG] = value

    setattr(CPUModelRunner, _FLAG, property(get, put))
