"""Hooks on modules, those too that must not have any, or would run other code if they had."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules

Enter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
Leave = Callable[[nn.Module, Any, Any, Any], None]


class ModuleHooks:
    """Calls `enter` before a module's forward and `leave` after it, if it raised too, until the end of a block.

    A scripted module takes no hooks, and an `nn.TransformerEncoderLayer` has a fused kernel that it uses only while no
    hook is on it or in it. Those are followed through torch's hooks on all modules, which know no keyword arguments.
    """

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        self._stack = stack
        self._bare = {
            id(inner)
            for module in model.modules()
            if isinstance(module, torch.jit.ScriptModule | nn.TransformerEncoderLayer)
            for inner in module.modules()
        }
        self._followed: dict[int, tuple[Enter, Leave]] = {}

    def attach(self, module: nn.Module, enter: Enter, leave: Leave) -> None:
        if id(module) in self._bare:
            if not self._followed:
                self._stack.callback(modules.register_module_forward_pre_hook(self._before).remove)
                self._stack.callback(modules.register_module_forward_hook(self._after, always_call=True).remove)
            self._followed[id(module)] = enter, leave
            return
        self._stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._stack.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if id(module) in self._followed:
            self._followed[id(module)][0](module, args, {})

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._followed:
            self._followed[id(module)][1](module, args, {}, output)
