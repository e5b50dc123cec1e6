"""Experiment files: axes multiply, and a mistake is refused with its line and what is allowed."""

from pathlib import Path

import pytest

from stabilitykit.checkpoints import open_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.records.sweep import Plan, Results
from stabilitykit.sweeps.axes import longest
from stabilitykit.sweeps.file import read_experiment
from stabilitykit.sweeps.model import open_swept
from stabilitykit.sweeps.plan import case_tokens, make_plan
from stabilitykit.sweeps.run import without_file

REPORTS = Path(__file__).parents[2] / "reports"
TINY = (
    "random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=2&kv_heads=1&head_dim=16&query_scalar=16"
    "&vocabulary=512&window=4&context=64"
)

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


def planned(folder: Path, *lengths: str, prompt: str = "@texts") -> Plan:
    """Of a text of 5 tokens and one of 20, <bos> included, both in bytes."""
    (folder / "texts").mkdir()
    (folder / "texts" / "long.txt").write_text("Hello there, world.")
    (folder / "texts" / "short.txt").write_text("Oh.")
    text = f'checkpoint = "{TINY}"\n[[grid]]\nprompt = "{prompt}"\nlength = [{", ".join(lengths)}]\n'
    read = read_experiment(written(folder, text))
    return make_plan(read, open_swept(read.checkpoint), command="stabilitykit sweep")


def test_lengths_that_a_text_does_not_reach_are_skipped_with_a_note(tmp_path: Path) -> None:
    plan = planned(tmp_path, "4", "10", '"1..8"')
    counts = {one: len(Tokenizer(open_checkpoint(TINY).vocabulary).encode(text)) for one, text in
              (("@texts/long.txt", "Hello there, world."), ("@texts/short.txt", "Oh."))}  # fmt: skip
    assert counts["@texts/short.txt"] == (short := 4)
    assert counts["@texts/long.txt"] >= 10
    ran = [(case.settings["prompt"], case.settings["length"], case.settings["tokens"]) for case in plan.cases]
    assert ran == [
        ("@texts/long.txt", 4, 4),
        ("@texts/short.txt", 4, 4),
        ("@texts/long.txt", 10, 10),
        ("@texts/long.txt", "1..8", 8),
        ("@texts/short.txt", f"1..{short}", short),
    ]
    assert [str(one) for one in plan.skipped] == [
        "@texts/short.txt has 4 tokens with <bos>, so a run of 10 tokens is skipped",
        "@texts/short.txt has 4 tokens with <bos>, so the rest of 1..8 tokens is skipped",
    ]


def test_a_maximum_runs_what_there_is_up_to_it_and_up_to_the_context(tmp_path: Path) -> None:
    plan = planned(tmp_path, '"up to 8"', '"up to 2000"')
    tokenizer = Tokenizer(open_checkpoint(TINY).vocabulary)
    found = {(case.settings["prompt"], case.settings["length"]): case for case in plan.cases}
    assert not plan.skipped
    for (prompt, length), case in found.items():
        text = (tmp_path / prompt[1:]).read_text()
        whole = tokenizer.encode(text)
        assert case_tokens(case, open_swept(TINY), tmp_path) == whole[: 8 if length == "up to 8" else 2000]
        assert case.settings["tokens"] == len(case_tokens(case, open_swept(TINY), tmp_path))
    (repeated,) = make_plan(
        without_file(TINY, prompts=["repeat: x"], dtypes=["float16"], lengths=["up to 2000"]),
        open_swept(TINY),
        command="",
    ).cases
    assert len(case_tokens(repeated, open_swept(TINY), tmp_path)) == 64  # the model's context


def test_texts_that_reach_no_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"line 4: .*none does: @texts/long.txt has \d+ tokens .*run of 60 tokens"):
        planned(tmp_path, "60")


def test_a_plan_without_a_file_is_that_of_the_file_that_would_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello")
    made = without_file(TINY, prompts=[str(tmp_path / "a.txt"), "prose"], dtypes=["bfloat16"], lengths=[4, "1..4"])
    read = read_experiment(written(tmp_path, made.source))
    assert (read.title, read.checkpoint, read.tables) == (made.title, TINY, made.tables)
    assert made.tables["grid"][0]["prompt"] == [f"@{tmp_path}/a.txt", "prose"]
    assert made.tables["grid"][0]["length"] == [4, "1..4"]
    with pytest.raises(MisuseError, match=r"^dtype is float32 or .*'float17' is not\.$"):
        without_file(TINY, dtypes=["float17"])


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in REPORTS.glob("*/experiment.json")))
def test_the_cases_of_reports_from_before_are_found_by_their_ids(folder: str) -> None:
    results = Results.open(REPORTS / folder)
    assert results.missing() == []
    assert results.plan.skipped == ()
    kept = {path.stem for path in (REPORTS / folder / "records").glob("*")}
    assert kept == {case.id for case in results.plan.cases}
