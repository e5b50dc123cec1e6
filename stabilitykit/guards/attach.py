"""Hooks and attributes of a model, put there until they are removed; copies of the model can be freed of them too."""

from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
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
_NONE = object()


class Instead:
    """`call` where a module's own method `name` was; a copy of the module has its own method again."""

    def __init__(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        self._module, self._name, self._call = module, name, call
        update_wrapper(self, call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        return self if copied is None else MethodType(getattr(type(copied), self._name), copied)


class Attached:
    """What was put on a model."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []

    def before(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Any, *, if_raised: bool = False) -> None:
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=if_raised))

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """In front of the class's own, or of one that this very module has and gets back."""
        self._attributes.append((module, name, vars(module).get(name, _NONE)))
        vars(module)[name] = value

    def method(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        """`call` in front of a method."""
        self.attribute(module, name, Instead(module, name, call))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, name, before in reversed(self._attributes):
            if before is _NONE:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = before
        self._handles, self._attributes = [], []

    def strip(self, copied: nn.Module) -> None:
        """Takes them off a copy of the model."""
        names = {name for _, name, _ in self._attributes}
        for module in copied.modules():
            for table in _TABLES:
                held = getattr(module, table, {})
                for handle in self._handles:
                    held.pop(handle.id, None)
            for name in names & vars(module).keys():
                del vars(module)[name]
