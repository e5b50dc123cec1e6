"""Hooks and attributes of a model, put there until they are removed; copies of the model can be freed of them too."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Attached:
    """What was put on a model."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._attributes: list[tuple[nn.Module, str]] = []

    def before(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Any, *, if_raised: bool = False) -> None:
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=if_raised))

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """In front of the class's own; one that this very module has already is left as it is."""
        if name not in vars(module):
            vars(module)[name] = value
            self._attributes.append((module, name))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, name in self._attributes:
            vars(module).pop(name, None)
        self._handles, self._attributes = [], []

    def strip(self, copied: nn.Module) -> None:
        """Takes them off a copy of the model."""
        names = {name for _, name in self._attributes}
        for module in copied.modules():
            for table in _TABLES:
                held = getattr(module, table, {})
                for handle in self._handles:
                    held.pop(handle.id, None)
            for name in names & vars(module).keys():
                del vars(module)[name]
