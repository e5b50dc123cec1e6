"""The folder of a sweep: what is there, what is not, and what never mixes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from swept import clean_map, clean_run, lengths_case, memory, memory_case, plan, run_case, sweep

from stabilitykit.errors import MisuseError
from stabilitykit.records.sweep import USUAL, Case, Failure, Results


def test_results_are_found_again_by_case(tmp_path: Path) -> None:
    cases = [run_case(), run_case("float32"), lengths_case(), memory_case(), memory_case(length=512)]
    found = sweep(
        tmp_path,
        zip(
            cases,
            (clean_run(), clean_run("float32"), clean_map(), memory(), Failure(kind="raised", reason="no")),
            strict=True,
        ),
    )
    assert [(case, recording.header.dtype) for case, recording in found.runs()] == [
        (cases[0], "float16"),
        (cases[1], "float32"),
    ]
    assert [(case, lengths.longest) for case, lengths in found.length_maps()] == [(cases[2], 64)]
    assert list(found.memories()) == [(cases[3], memory())]
    assert found.failed() == [(cases[4], Failure(kind="raised", reason="no"))]
    assert found.missing() == []
    reference = found.reference(cases[0])
    assert reference is not None
    assert reference.header.dtype == "float32"
    assert found.reference(lengths_case(prompt="code")) is None
    assert found.recording(cases[0]) is found.recording(cases[0])


def test_a_case_that_is_done_after_a_failure_is_done(tmp_path: Path) -> None:
    found = sweep(tmp_path, [(run_case(), Failure(kind="killed", reason="Killed."))])
    assert found.missing() == []
    clean_run().save(found.path(run_case()))
    assert found.is_done(run_case())
    assert found.failed() == []


def test_a_forgotten_failure_is_missing_again_and_forgetting_twice_is_no_error(tmp_path: Path) -> None:
    found = sweep(tmp_path, [(run_case(), Failure(kind="killed", reason="Killed."))])
    for _ in range(2):
        found.forget_failure(run_case())
    assert found.missing() == [run_case()]


def test_a_case_is_known_by_its_settings() -> None:
    ids = [run_case().id, run_case(bos=False).id, run_case(seed=1).id, lengths_case().id, memory_case().id]
    assert len(set(ids)) == len(ids)
    assert str(run_case(seed=1)) == "prose 3 tokens with <bos> float16 seed 1"
    assert str(run_case(length=1)) == "prose 1 token with <bos> float16"
    wild = run_case(prompt="../a b/<c>")
    assert "/" not in wild.id


def test_cases_keep_their_ids_when_an_axis_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "prompt": "prose", "length": "all", "bos": True, "dtype": "float16", **USUAL, "text_sha256": "ab", "tokens": 3,
        "device": "cpu",
    }  # fmt: skip
    case = Case(kind="run", settings=settings)
    assert (
        case.id == "run-prompt=prose-length=all-bos=True-dtype=float16-rescale=1.0-level=operators-r-8b10c68858"
    )  # as files of stored reports are called
    monkeypatch.setitem(USUAL, "backend", "own")  # an axis of a later version
    added, other = (Case(kind="run", settings=settings | {"backend": name}) for name in ("own", "transformers"))
    assert added.id == case.id
    assert added.unusual == case.unusual
    assert str(added) == str(case)
    assert other.id != case.id
    assert plan([added]).differences(plan([case])) == []
    assert plan([other]).differences(plan([case])) == ["1 case added and 1 removed"]


def test_memory_is_compared_without_the_libraries() -> None:
    assert memory(measured=800).computed == 1000
    assert memory(measured=800, libraries=7).error == 0.25
    assert memory(measured=1250).error == -0.2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoint": "other"}, "the checkpoint was toy and is other"),
        ({"sha256": "cd" * 32}, "the checkpoint's SHA-256 was abababababab and is cdcdcdcdcdcd"),
        ({"versions": {"torch": "3.0"}}, "torch was 2.9 and is 3.0"),
        ({"machine": {"cores": 4}}, "cores was 2 and is 4"),
        ({"cases": (run_case("float32"),)}, "1 case added and 1 removed"),
    ],
)
def test_another_experiment_never_mixes_with_what_is_there(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    first = plan([run_case()])
    Results.create(tmp_path, first)
    Results.create(tmp_path, first)
    with pytest.raises(MisuseError) as raised:
        Results.create(tmp_path, replace(first, **change))  # type: ignore[arg-type]
    assert said in str(raised.value)
    assert "Choose another folder with --out" in str(raised.value)
    assert Results.open(tmp_path).plan == first


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"has no experiment\.json"):
        Results.open(tmp_path)
    (tmp_path / "records").mkdir()
    with pytest.raises(MisuseError, match=r"without an experiment\.json"):
        Results.create(tmp_path, plan([]))
    for text, said in (
        ("{", "cannot be read as an experiment's plan"),
        ("[]", "cannot be read as an experiment's plan"),
        (json.dumps({"schema": 99}), "has schema 99"),
    ):
        (tmp_path / "experiment.json").write_text(text)
        with pytest.raises(MisuseError, match=said):
            Results.open(tmp_path)
