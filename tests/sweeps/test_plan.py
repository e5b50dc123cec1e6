"""Experiment files: axes multiply, and a mistake is refused with its line and what is allowed."""

from pathlib import Path

import pytest

from stabilitykit.errors import MisuseError
from stabilitykit.sweeps.axes import longest
from stabilitykit.sweeps.file import read_experiment

GOOD = """title = "t"
checkpoint = "gemma3-270m"
[[grid]]
prompt = ["prose", "code"]
length = ["1..64", 8, "all"]
dtype = "float16"
[[grid]]
bos = false
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def test_every_grid_holds_every_axis_with_its_default(tmp_path: Path) -> None:
    first, second = read_experiment(written(tmp_path, GOOD)).tables["grid"]
    assert first["length"] == ["1..64", 8, "all"]
    assert first["bos"] == [True]
    assert second["bos"] == [False]
    assert second["dtype"] == ["float16"]


def test_an_override_replaces_an_axis_in_every_grid(tmp_path: Path) -> None:
    overrides = ["dtype=bfloat16,float32", "checkpoint=random:gemma2-2b", "checks=3"]
    read = read_experiment(written(tmp_path, GOOD), overrides)
    assert [grid["dtype"] for grid in read.tables["grid"]] == [["bfloat16", "float32"]] * 2
    assert read.checkpoint == "random:gemma2-2b"
    assert read.checks == (3,)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('title = "t"', "title = ", "line 1"),
        ('dtype = "float16"', 'dtyp = "float16"', "line 6: unknown axis 'dtyp'; choose one of: bos, dtype, "),
        ('dtype = "float16"', 'dtype = "float17"', "line 6: dtype is float32 or .*'float17'"),
        ("bos = false", "bos = 0", "line 8: bos is true or false; 0"),
        ('"1..64"', '"2..64"', "line 5: length is a number of tokens"),
        ('"1..64"', "0", "line 5: length is"),
        ("bos = false", "rescale = 3.0", "line 8: rescale is a power of two"),
        ("bos = false", "bos = []", "line 8: An axis has at least one value"),
        ('checkpoint = "gemma3-270m"', "", "names its checkpoint"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in GOOD
    with pytest.raises(MisuseError, match=said):
        read_experiment(written(tmp_path, GOOD.replace(before, after)))


@pytest.mark.parametrize("override", ["dtype", "dtipe=float16", "dtype=float17", "length=0"])
def test_an_override_that_means_nothing_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(MisuseError, match="--set"):
        read_experiment(written(tmp_path, GOOD), [override])


def test_the_longest_run_of_a_length() -> None:
    assert [longest(length) for length in ("1..64", 8, "all")] == [64, 8, None]
