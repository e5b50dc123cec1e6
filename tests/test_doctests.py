"""The examples in docstrings: each is run, and shows what it says."""

import doctest
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

import stabilitykit


def modules_with_examples() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(stabilitykit.__path__, "stabilitykit.")]
    root = Path(stabilitykit.__path__[0]).parent
    files = {name: root.joinpath(*name.split(".")).with_suffix(".py") for name in names}
    return [name for name, file in files.items() if file.is_file() and ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module(name: str) -> None:
    done = doctest.testmod(import_module(name))
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize(
    "name", ["bound", "forecast", "open_model", "profile", "repair", "search", "sweep", "verify", "verify_proof"]
)
def test_a_public_question_shows_an_example_and_says_what_it_takes(name: str) -> None:
    text = getattr(stabilitykit, name).__doc__
    for part in (">>> ", "Args:", "Returns:", "Raises:"):
        assert part in text
