"""`stabilitykit sweep`: run an experiment's cases, those that are missing, and write the report."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import stabilitykit.cli.options as options

if TYPE_CHECKING:
    from stabilitykit.records.sweep import Case, Results
    from stabilitykit.sweeps.cost import Cost


def sweep(
    experiment: Annotated[
        Path,
        typer.Argument(
            help="TOML file of the experiment, which names its checkpoint as profile does.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE in place of the file's, such as dtype=float16 or length=16,64; repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; reports/NAME if not given.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cases, with estimated seconds and bytes; run nothing.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cases again.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write records only.")] = False,
    as_json: options.Json = False,
) -> None:
    """Run EXPERIMENT's cases, each finished one kept on disk, and write the report.

    The same command again does only what is missing. Exits 0 when no case failed, 1 otherwise.
    """
    from stabilitykit.cli import screen
    from stabilitykit.sweeps.run import sweep as run

    if dry_run:
        _print_plan(experiment, overrides or (), as_json)
        return
    display = _Display()
    with display.bar:
        results = run(
            experiment,
            overrides=overrides or (),
            out=out,
            retry_failed=retry_failed,
            report=False,
            command=options.command_line(),
            watch=display,
        )
    failed = results.failed()
    if as_json:
        done = len(results.plan.cases) - len(failed) - len(results.missing())
        reasons = {case.id: failure.reason for case, failure in failed}
        screen.print_json({"folder": str(results.folder), "done": done, "failed": reasons})
    else:
        for case, failure in failed:
            screen.print_note(f"Failed: {case}: {failure.reason}")
        screen.print_note(f"Records: {results.folder}/records")
    if not no_report:
        from stabilitykit.cli.report import write

        write(results.folder, against=None, quiet=as_json)
    if failed:
        sys.exit(1)


def _print_plan(experiment: Path, overrides: Sequence[str], as_json: bool) -> None:
    """The cases that would run, and what each would cost."""
    from stabilitykit.checkpoints.config import GemmaConfig
    from stabilitykit.cli import screen
    from stabilitykit.models.transformers.backend import PREFIX
    from stabilitykit.sweeps.cost import cost
    from stabilitykit.sweeps.run import plan

    with screen.progress_bar() as progress:
        planned = plan(experiment, overrides=overrides, progress=progress)
    costs: list[Cost | None] = [None] * len(planned.cases)
    if not planned.checkpoint.startswith(PREFIX):  # of what transformers runs nothing is known beforehand
        config = GemmaConfig(**planned.config)
        costs = [cost(case, config) for case in planned.cases]
    if as_json:
        screen.print_json({"cases": [_planned(*pair) for pair in zip(planned.cases, costs, strict=True)]})
    else:
        screen.print_cases(planned, costs)


def _planned(case: "Case", cost: "Cost | None") -> dict[str, Any]:
    return {"id": case.id, "kind": case.kind, "settings": case.settings, "cost": None if cost is None else asdict(cost)}


class _Display:
    """Done, running, failed, and the time that is left, judged by the cases done so far."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from stabilitykit.cli import screen

        self.done = self.failed = 0
        self.task: TaskID | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=screen.messages,
            disable=not screen.messages.is_terminal,
        )

    def __call__(self, results: "Results", case: "Case", message: dict[str, Any]) -> None:
        total = len(results.plan.cases)
        if self.task is None or "finished" in message or "failed" in message:
            self.failed = len(results.failed())
            self.done = total - self.failed - len(results.missing())
        if self.task is None:
            self.task = self.bar.add_task("cases", total=total)
        what = f" · {message['what']} {message['done']}/{message['total']}" if "what" in message else ""
        failed = f", {self.failed} failed" if self.failed else ""
        self.bar.update(
            self.task, completed=self.done + self.failed, description=f"{self.done} done{failed} · {case}{what}"
        )
