"""What a recorder fails at becomes a note, and the pass goes on."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from watched import Function, X, unharmed, unseen

from stabilitykit.errors import MisuseError, SkippedStatements
from stabilitykit.models.operators import WatchMode
from stabilitykit.recorder import Statistic, record
from stabilitykit.recorder.observe import Observer
from stabilitykit.recorder.session import Session
from stabilitykit.recorder.unseen import MOST, Unseen
from stabilitykit.records import Level


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Observer, "observe"),
        (Session, "_begin_step"),
        (Session, "_module_output"),
        (Session, "_inputs"),
        (Observer, "settle"),
        (Observer, "begin"),
    ],
)
def test_a_recorder_that_fails_says_so(owner: type, name: str, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, owner, name, LookupError("planted\nwith more lines"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was recorded
        recording = unharmed(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), X, level=level)
    if (name, level) == ("_inputs", "operators"):
        assert not unseen(recording)
    else:
        assert any("(LookupError: planted)" in note for note in unseen(recording))
    assert len(unseen(recording)) <= MOST + 1


def test_before_an_operator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, Session, "_before", LookupError("planted"))
    model = nn.Linear(8, 8)
    with record(model, formats=()) as recording, warnings.catch_warnings():
        model(X)
    assert "could not be seen: the result of matmul (LookupError: planted)" in unseen(recording)


def test_interrupts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_after", interrupt)
    model = nn.Linear(8, 8)
    with pytest.raises(KeyboardInterrupt), record(model, formats=()):
        model(X)
    assert not model._forward_hooks


def test_the_first_break_still_ends_a_block() -> None:
    model = nn.Sequential(Function(lambda x: x * 1e38 * 1e38), nn.Linear(8, 8))
    reached = False
    left_out = pytest.warns(SkippedStatements, match="`reached` was not assigned")
    with left_out, record(model, formats=(), stop_at_break=True) as recording:
        model(X)
        reached = True
    assert not reached
    assert recording.first_break() is not None
    assert not unseen(recording)


def test_a_statistic_of_a_wrong_name_is_refused_before_the_pass() -> None:
    with pytest.raises(MisuseError, match="identifier"), record(nn.Linear(8, 8), statistics=[wrong()]):
        raise AssertionError("the block ran")


def wrong() -> Statistic:
    return Statistic("no name", "unit", lambda x: x.sum())


def test_notes_are_few() -> None:
    unseen = Unseen()
    for number in range(9):
        unseen.failed(f"thing {number}", ValueError("first line\nsecond line"))
    for place in ("a", "b", "c"):
        unseen.failed(f"mean in {place}", ValueError(), "mean")
    notes = unseen.notes()
    assert notes[0] == "could not be seen: thing 0 (ValueError: first line)"
    assert notes[-1] == "could not be seen: 5 more things of other kinds"
    assert len(notes) == MOST + 1


def test_a_mode_that_looks_on_runs_each_operator_once() -> None:
    seen: list[str] = []

    def before(kind: Any, args: Any, kwargs: Any) -> str:
        if kind.name == "mul":
            raise LookupError
        return kind.name

    def after(kind: Any, state: str, args: Any, kwargs: Any, output: Any) -> None:
        assert state == kind.name
        seen.append(state)
        if kind.name == "exp":
            raise KeyError

    def failed(kind: Any, error: Exception) -> None:
        seen.append(f"{kind.name} {type(error).__name__}")

    with WatchMode(before, after, failed):
        found = (torch.ones(2) * 2).exp().sin()
    assert torch.equal(found, (torch.ones(2) * 2).exp().sin())
    assert seen == ["ones", "mul LookupError", "exp", "exp KeyError", "sin"]
