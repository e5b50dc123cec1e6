"""Compiles Triton's kernels for GPUs that need not be there, and prints each instruction that may flush a subnormal."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from stabilitykit.recorder import DEFAULT_FORMATS
from stabilitykit.recorder.kernels import cuda, cuda_softmax
from stabilitykit.recorder.kernels.layout import edges

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Driver:
    """As much of a GPU as a compiler asks about."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class CompiledOnly:
    """In the place of a kernel: what would launch it compiles it for the very same arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            made = self.kernel.warmup(*arguments, grid=grid, **constants)
            assert made.asm["cubin"]
            words = {word for line in made.asm["ptx"].splitlines() for word in line.split()[:2] if ".ftz" in word}
            for word in sorted(words):
                print(self.kernel.fn.__name__, word)

        return launch


def compile_for(dtype: torch.dtype) -> None:
    """The kernels for dense tensors, and for strided ones with a mask."""
    against = edges(dtype, DEFAULT_FORMATS)
    tensor = torch.zeros(4, 4, 4096, dtype=dtype)
    cuda.tally(tensor, against)
    if dtype in (torch.float16, torch.float64):
        cuda.tally(tensor[..., ::3], against, torch.zeros(4096, dtype=torch.bool)[::3].expand(4, 4, -1), 0.0)
        cuda_softmax.tally(tensor, tensor, 1, None)
    else:
        logits = torch.zeros(2, 3, 4, 40).transpose(1, 2)
        cuda_softmax.tally(logits, logits.to(dtype), 2, torch.zeros(40, dtype=torch.bool))


for module in (cuda, cuda_softmax):
    for name, value in list(vars(module).items()):
        if isinstance(value, triton.JITFunction) and name in ("count", "look", "merge"):
            setattr(module, name, CompiledOnly(value))
for capability, dtypes in ((90, DTYPES), (80, DTYPES[1:2])):
    triton.runtime.driver.set_active(Driver(capability))
    for dtype in dtypes:
        compile_for(dtype)
