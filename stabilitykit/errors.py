"""Everything the kit raises on purpose.

    StabilityKitError          caught once, by the command line: one sentence, no traceback
    ├── MisuseError            what was asked for cannot be meant (exit code 2)
    │   └── CheckpointError    a checkpoint that is missing, damaged, or not what it was taken for
    └── SamplingError          the probabilities handed to the sampler are not probabilities

A message states the invariant, what came instead, and what to try.
"""


class StabilityKitError(Exception):
    """Base of the kit's own exceptions; `str()` is written for the person who sees it."""


class MisuseError(StabilityKitError, ValueError):
    """An argument, a file or a combination of them that cannot be meant."""


class CheckpointError(MisuseError):
    """A checkpoint that is missing, damaged, or not what it was taken for."""


class SamplingError(StabilityKitError, RuntimeError):
    """Probabilities that are no probabilities, found before a GPU asserts on them.

    On CUDA `torch.multinomial` reports this as a device-side assert that ends the process's
    context; the sampler looks first and raises this instead. On a CPU torch's own error is raised.
    """
