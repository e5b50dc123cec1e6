"""transformers itself: imported when it is needed, kept quiet, its refusals told in the kit's words."""

import logging
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stabilitykit.errors import CheckpointError, MisuseError

PREFIX = "hf:"


def imported() -> Any:
    try:
        import transformers
    except ImportError:
        raise MisuseError('hf: needs transformers, which is not installed: pip install "stabilitykit[hf]".') from None
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the libraries' bars, remarks and warnings: what is wrong with a checkpoint is said by the kit."""
    told, bitsandbytes = transformers.utils.logging, logging.getLogger("bitsandbytes")
    verbosity, bars, level = told.get_verbosity(), told.is_progress_bar_enabled(), bitsandbytes.level
    told.set_verbosity_error()
    told.disable_progress_bar()
    bitsandbytes.setLevel(logging.ERROR)  # it regrets an absent kernel as soon as peft imports it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.set_verbosity(verbosity)
        bitsandbytes.setLevel(level)
        if bars:
            told.enable_progress_bar()


@contextmanager
def explained(name: str, what: str = "a folder that transformers can load") -> Iterator[None]:
    """A library's refusal of a folder as the kit's own, with the reason it gave."""
    try:
        yield
    except MisuseError:
        raise
    except Exception as error:  # transformers, safetensors, peft and the hub's library each raise their own
        if "trust_remote_code" in str(error):  # the argument by which transformers asks for leave
            raise MisuseError(
                f"{name} brings Python code of its own, which was not run. If you trust its author, run it with "
                "--trust-remote-code (in Python, trust_remote_code=True)."
            ) from None
        said = repr(error) if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = textwrap.shorten(said, 300, placeholder=" ...")
        raise CheckpointError(f"{name} is not {what}: {reason.removesuffix('.')}.") from error
