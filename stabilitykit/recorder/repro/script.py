"""The script that runs one operator of torch's on operands in a file, and then the one that absorbed its damage."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stabilitykit.recorder.repro.operation import Operation, Slot
from stabilitykit.words import escaped

FILE = "operands.safetensors"
ABSORBING = "absorbing."
"""What the names of the second operator's operands begin with."""

_BODY = """
from pathlib import Path

import torch
from safetensors.torch import load_file

DEVICE = "{device}"


def show(name: str, tensor: torch.Tensor) -> None:
    numbers = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).cpu().double().flatten().tolist()
    shown = ", ".join(f"{{number:.8g}}" for number in numbers[:6]) + (", ..." if len(numbers) > 6 else "")
    lost = sum(number != number or abs(number) == float("inf") for number in numbers)
    of = f"{{str(tensor.dtype)[6:]}} {{list(tensor.shape)}}, {{lost}} of {{len(numbers)}} not finite"
    print(f"{{name}}: {{of}}: {{shown}}")


given = load_file(Path(__file__).with_name("{file}"), device=DEVICE)
"""

_WIDE = """
wide = {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in given.items()}
"""


def named(operation: Operation, *, absorbing: bool = False) -> dict[str, Tensor]:
    """Its tensors by the names that they have in the file."""
    prefix = ABSORBING if absorbing else ""
    return {prefix + name: tensor.contiguous().clone() for name, tensor in operation.tensors.items()}


def body(operation: Operation, absorbing: Operation | None, *, wide: bool) -> str:
    """All but the docstring. `wide`: the operator is run in float64 too."""
    name = operation.func._schema.name.partition("::")[2]
    lines = [_BODY.format(device=operation.device, file=FILE).strip("\n"), _shown(named(operation))]
    if wide:
        lines.append(_WIDE.strip("\n"))
    lines.append(f'show("{name}", {_call(operation, "given")})')
    if wide:
        lines.append(f'show("{name} in float64", {_call(operation.in_float64(), "wide")})')
    if absorbing is not None:
        name = absorbing.func._schema.name.partition("::")[2]
        lines.append(_shown(named(absorbing, absorbing=True)))
        lines.append(f'show("{name}, which absorbs it", {_call(absorbing, "given", ABSORBING)})')
    return "\n".join(lines) + "\n"


def docstring(paragraphs: Sequence[str], printed: Sequence[str]) -> str:
    """Of a script: paragraphs are wrapped, what is `printed` stands as it is."""
    told = [textwrap.fill(_safe(text), 110, break_long_words=False) for text in paragraphs]
    told.append("It prints:")
    told.append("\n".join(f"    {_safe(line)}" for line in printed))
    return '"""' + "\n\n".join(told) + '\n"""\n\n'


def runs(source: str, path: str) -> list[str]:
    """What a script prints that lies at `path`. Raises whatever it raises."""
    printed: list[str] = []
    exec(compile(source, path, "exec"), {"__name__": "__main__", "__file__": path, "print": printed.append})
    return printed


def _shown(names: Iterable[str]) -> str:
    listed = ", ".join(f'"{name}"' for name in names)
    return f"for name in [{listed}]:\n    show(name, given[name])"


def _safe(text: str) -> str:
    """Text that ends no docstring and is no escape in it."""
    return escaped(text.replace("\\", "\\\\").replace('"', "'"))


def _call(operation: Operation, tensors: str, prefix: str = "") -> str:
    def literal(value: Any) -> str:
        if isinstance(value, Slot):
            return f'{tensors}["{prefix}{value.name}"]'
        if isinstance(value, list):
            return f"[{', '.join(map(literal, value))}]"
        if isinstance(value, torch.device):
            return "DEVICE"
        if isinstance(value, float) and not abs(value) < float("inf"):
            return f'float("{value}")'
        return repr(value)

    args = [literal(value) for value in operation.args]
    args += [f"{name}={literal(value)}" for name, value in operation.kwargs.items()]
    schema = operation.func._schema
    function = f"torch.ops.aten.{schema.name.partition('::')[2]}.{schema.overload_name or 'default'}"
    return f"{function}({', '.join(args)}){operation.picked()}"


def versions(of: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in of.items())
