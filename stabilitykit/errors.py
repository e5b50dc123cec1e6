"""The exceptions that the kit raises on purpose.

    StabilityKitError          caught once, by the command line: the message, without a traceback
    ├── MisuseError            an invalid argument or file, or combination of them (exit code 2)
    │   └── CheckpointError    a checkpoint that is missing, damaged or not supported
    └── SamplingError          the sampler was given invalid probabilities

and a warning, SkippedStatements: a recorded block ended at its first break, as it was asked to.

A message states what is required, what came instead and what to try.
"""


class StabilityKitError(Exception):
    """Base of the kit's own exceptions; `str()` is a message for the user."""


class MisuseError(StabilityKitError, ValueError):
    """An invalid argument or file, or an invalid combination of them."""


class CheckpointError(MisuseError):
    """A checkpoint that is missing, damaged or not supported."""


class SamplingError(StabilityKitError, RuntimeError):
    """Invalid probabilities, found before a device-side assert.

    On CUDA `torch.multinomial` reports them by a device-side assert, after which the process can no longer use the GPU;
    the sampler checks first and raises this instead. On a CPU torch's own error is raised.
    """


class SkippedStatements(UserWarning):
    """`record(..., stop_at_break=True)` ended a block, and statements of it did not run; `str()` says which."""
