"""What the commands print: progress on standard error, findings on standard output, as the report's own blocks."""

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from stabilitykit.diagnosis import chain, verdict, weights_sentence
from stabilitykit.diagnosis.forecast import Forecast
from stabilitykit.diagnosis.gate import what_to_do
from stabilitykit.diagnosis.outcome import is_harmless
from stabilitykit.records import Recording
from stabilitykit.records.bounds import SiteBound
from stabilitykit.records.gate import Gate
from stabilitykit.records.remedies import Ranking
from stabilitykit.records.repaired_folder import FolderCheck
from stabilitykit.records.search import Search
from stabilitykit.records.sweep import Plan
from stabilitykit.records.training import TrainingDiagnosis
from stabilitykit.records.trials import Diagnosis
from stabilitykit.report.parts import by_layer, gate, precision, training, trials
from stabilitykit.report.parts.by_layer import LEGEND
from stabilitykit.report.parts.cases import cases
from stabilitykit.report.sections import bounds, forecast, remedies, search
from stabilitykit.report.sections.chain import spread
from stabilitykit.report.terminal import print_blocks

if TYPE_CHECKING:
    from stabilitykit.sweeps.cost import Cost

__all__ = ["LEGEND"]

# Shown only once the work has taken this long, in seconds: a flash of a bar says nothing.
_PATIENCE = 1.0
_LONG = 2.0  # and in a pipe only after this many: what is soon over leaves nothing on standard error

_BEST = 3  # changes whose commands are shown
_WORST = 8  # tokens of each context of a search

output = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
messages = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document, strictly: anything that JSON cannot hold is an error here, not in the reader."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2))


class Stages:
    """Where nobody watches a bar, a line on standard error for each stage of long work, after the seconds so far.

    Nothing is said of work that is over within `_LONG` seconds. At that time the stage that is at work then is told,
    also where it says nothing of itself for minutes.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said: set[str] = set()
        self._now: str | None = None
        self._lock = threading.Lock()
        self._late = threading.Timer(min(_LONG, threading.TIMEOUT_MAX), self._tell)
        self._late.daemon = True
        if not messages.is_terminal:
            self._late.start()

    def __call__(self, stage: str) -> None:
        self._now = stage
        if not messages.is_terminal and time.monotonic() - self._began > _LONG:
            self._tell()

    def close(self) -> None:
        self._late.cancel()

    def _tell(self) -> None:
        with self._lock:
            if self._now is None or self._now in self._said:
                return
            self._said.add(self._now)
            messages.print(f"{time.monotonic() - self._began:.0f} s: {self._now}", soft_wrap=True, markup=False)


class ProgressBar:
    """Called with (what, done, total). On a terminal a bar that shows itself when the work outlasts a second;
    elsewhere `Stages`.
    """

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=messages,
            transient=True,
        )
        self._began = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._stages = Stages()
        self._shown = False

    def __call__(self, what: str, done: int, total: int) -> None:
        self._stages(what)
        if what not in self._tasks:
            for task in self._tasks.values():
                self._bars.update(task, visible=False)
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)
        if not self._shown and messages.is_terminal and time.monotonic() - self._began > _PATIENCE:
            self._bars.start()
            self._shown = True

    def close(self) -> None:
        self._stages.close()
        if self._shown:  # stopping bars that never started prints an empty line
            self._bars.stop()


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    bar = ProgressBar()
    try:
        yield bar
    finally:
        bar.close()


def print_note(text: str) -> None:
    output.print(Text(text, style="dim"))


def print_weights(recordings: Sequence[Recording]) -> None:
    """A line for each dtype in which the weights are not what they were."""
    stored = [recording.header.weights for recording in recordings]
    lines = [line for weights in stored if weights is not None and (line := weights_sentence(weights))]
    for line in lines:
        print_note(line)
    if lines:
        output.print()


def is_broken(recording: Recording) -> bool:
    """Whether what its verdict says is bad news."""
    return (recording.first_break() is not None and not is_harmless(recording)) or recording.header.error is not None


def print_verdict(recording: Recording, reference: Recording | None) -> None:
    """What broke, or how much headroom was left."""
    style = "bold red" if is_broken(recording) else "bold green"
    output.print(Text(verdict(recording, reference), style=style))
    output.print()


def print_layers(recording: Recording) -> None:
    """The table by layer; LEGEND explains its columns."""
    print_blocks([by_layer.layers(recording)], output)


def print_precision(recording: Recording, reference: Recording | None) -> None:
    """Where the run is least precise, if there is a float32 run that it was compared with."""
    if reference is not None and reference is not recording:
        found = precision.least_precise(recording, reference.header.dtype)
        print_blocks([] if found is None else [found], output)


def print_steps(recording: Recording) -> None:
    """The steps of a generation at which the largest value so far grew, and the last one."""
    steps = by_layer.steps(recording)
    print_blocks([] if steps is None else [steps], output)


def print_chain(recording: Recording) -> None:
    """How a break spread, if there was one."""
    print_blocks([spread(recording)] if chain(recording) else [], output)


def print_cases(plan: Plan, costs: "Sequence[Cost | None]") -> None:
    """What a sweep would run, and what it would cost."""
    print_blocks(cases(plan, costs), output, rows=len(plan.cases))


def print_forecasts(recording: Recording, found: Sequence[Forecast]) -> None:
    """A sentence for each format, then all of them in a table."""
    print_blocks(forecast.of_run(recording, found), output)


def print_bounds(found: Sequence[SiteBound]) -> None:
    """A sentence on all sites, then a row for each kind of tensor."""
    print_blocks(bounds.blocks(found), output)


def print_proof(found: Mapping[str, float], assumptions: Sequence[str]) -> None:
    """What a checker proved: the bound of the worst layer of each kind of tensor, and what that takes for granted."""
    print_blocks(bounds.proof(found, assumptions), output)


def print_check(check: FolderCheck) -> None:
    """What a repaired folder was compared with, and how it runs in float16."""
    print_blocks(remedies.of_check(check), output)


def print_gate(found: Gate) -> None:
    """What was checked, each violated limit, and whether it holds."""
    for note in (found.checkpoint, *(f"{note}." for note in found.notes)):
        print_note(str(note))
    output.print()
    print_blocks(gate.blocks(found), output, whole="the JSON document (--json)")
    for purpose, command in what_to_do(found):
        print_command(purpose, command)


def print_command(purpose: str, command: str) -> None:
    """A command to be copied, on one line, after what it is for."""
    output.print(Text(f"{purpose}: {command}", style="dim"), soft_wrap=True)


def print_diagnosis(found: Diagnosis | TrainingDiagnosis) -> None:
    """What broke, what cures it, all that was tried, and what does the best of it."""
    is_well = found.plain.cured if isinstance(found, TrainingDiagnosis) else found.is_well
    output.print(Text(found.verdict, style="bold green" if is_well else "bold red"))
    output.print()
    shown = training.blocks(found) if isinstance(found, TrainingDiagnosis) else trials.blocks(found)
    print_blocks(shown, output, whole="the JSON document (--json)")
    if not is_well:
        for one in found.cures[:_BEST]:
            output.print(Text(f"To do it, {one.name}:", style="bold"))
            output.print(Text(one.command), soft_wrap=True)  # to be copied
            output.print()
    for note in found.notes:
        print_note(f"{note[0].upper()}{note[1:]}.")


def print_ranking(ranking: Ranking) -> None:
    """Which remedy to take, what a rescale does, and the remedies, best first."""
    print_blocks(remedies.blocks(ranking), output)


def print_search(found: Search) -> None:
    """What overflows, or comes nearest; how prompts grew; the worst tokens of each context."""
    print_blocks(search.blocks(found), output, rows=_WORST, whole="the JSON document (--json)")
