"""Following a run: which module is running, and every operator after it has run, by a name that other runs share."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

from torch import nn

from stabilitykit.models.operators import OperatorMode, Traits


@cache
def _name(func: Any) -> str:
    name: str = func._schema.name.partition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


class Following(OperatorMode):  # type: ignore[no-untyped-call]
    """Inside the block, `after(name, site, func, args, kwargs, output)` is called for every operator, views included,
    with composites taken apart.

    `name` is ATen's, without the overload and the mark of those that write in place. `site` is made of the path of the
    innermost module, how often that ran before, the name, and how many operators of that name it ran before.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._run, views=True)
        self.model = model
        self.running = [""]
        self._runs: Counter[str] = Counter()
        self._calls = [""]
        self._numbers: list[Counter[str]] = [Counter()]

    def attach(self, stack: ExitStack, entered: Callable[[str, nn.Module], None] = lambda path, module: None) -> None:
        """Follows the model's modules until the end of `stack`; `entered` is called when one begins."""
        for path, module in self.model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(self._enter, path, entered)).remove)
            stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)

    def after(self, name: str, site: str, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        raise NotImplementedError

    def _run(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = kind.func(*args, **kwargs)
        name = _name(kind.func)
        self.after(name, self._site(name), kind.func, args, kwargs, output)
        return output

    def _enter(self, path: str, entered: Callable[[str, nn.Module], None], module: nn.Module, args: Any) -> None:
        self.running.append(path)
        self._calls.append(f"#{self._runs[path]}" if self._runs[path] else "")
        self._runs[path] += 1
        self._numbers.append(Counter())
        entered(path, module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        self._calls.pop()
        self._numbers.pop()

    def _site(self, operator: str) -> str:
        number = self._numbers[-1][operator]
        self._numbers[-1][operator] += 1
        return f"{self.running[-1]}{self._calls[-1]}/{operator}.{number}"
