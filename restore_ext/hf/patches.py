"""Hooks and attributes on module instances, undone in one call and absent from every copy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_ABSENT = object()


class Patches:
    """What was put on modules. No class is changed.

    A patched module pickles, saves and copies as if it were not: the patches, and the state they
    lead to, belong to this instance alone. So while patched it has a `__getstate__` of its own.
    Patches may lie on other patches, if undone in the reverse order.
    """

    def __init__(self) -> None:
        self._modules: dict[nn.Module, _StockState] = {}
        self._handles: list[Any] = []

    def hook(self, module: nn.Module, kind: str, hook: Callable[..., Any], **options: Any) -> None:
        """Registers a hook: kind "forward_pre_hook" or "forward_hook", options as in torch."""
        handle = getattr(module, f"register_{kind}")(hook, **options)
        self._handles.append(handle)
        self._on(module).hooks.add(handle.id)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets a plain attribute of the instance."""
        self._on(module).replace(name, value)

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, on in self._modules.items():
            on.strip(module.__dict__)
        self._handles.clear()
        self._modules.clear()

    def _on(self, module: nn.Module) -> "_StockState":
        if module not in self._modules:
            on = self._modules[module] = _StockState(module)
            on.replace("__getstate__", on)
        return self._modules[module]


@dataclass
class _StockState:
    """The `__getstate__` of a patched module: its state without the patches."""

    module: nn.Module
    hooks: set[int] = field(default_factory=set)  # ids of torch's RemovableHandle, unique at large
    before: dict[str, Any] = field(default_factory=dict)  # what each attribute was

    def replace(self, name: str, value: Any) -> None:
        self.before.setdefault(name, self.module.__dict__.get(name, _ABSENT))
        self.module.__dict__[name] = value

    def strip(self, attributes: dict[str, Any]) -> None:
        for name, value in self.before.items():
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value

    def __call__(self) -> dict[str, Any]:
        state = dict(self.module.__dict__)
        while isinstance(on := state.get("__getstate__"), _StockState):
            on.strip(state)
            for name, value in state.items():
                if "_hooks" in name and isinstance(value, dict) and on.hooks & value.keys():
                    rest = ((k, v) for k, v in value.items() if k not in on.hooks)
                    state[name] = type(value)(rest)
        return state
