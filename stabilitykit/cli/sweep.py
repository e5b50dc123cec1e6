"""`stabilitykit sweep`: run an experiment's cases, those that are missing, and write the report."""

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stabilitykit.records.sweep import Case, Results
    from stabilitykit.sweeps.cost import Cost


def sweep(
    experiment: Annotated[Path, typer.Argument(help="The experiment's TOML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE in place of the file's, such as dtype=float16 or length=16,64."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for the results; reports/NAME if not given.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cases and what they will cost; run nothing.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cases again.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write records only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Run EXPERIMENT's cases, each finished one kept on disk, and write the report.

    The same command again does only what is missing. Exits 0 when no case failed, 1 otherwise.
    """
    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.records.sweep import Results
    from stabilitykit.report.sections import SECTIONS
    from stabilitykit.sweeps.cost import cost
    from stabilitykit.sweeps.file import read_experiment
    from stabilitykit.sweeps.plan import make_plan
    from stabilitykit.sweeps.sweep import sweep as run

    read = read_experiment(experiment, overrides or [], sections=tuple(SECTIONS))
    folder = out or Path("reports") / experiment.stem
    command = shlex.join(
        ["stabilitykit", "sweep", str(experiment)]
        + [part for override in overrides or [] for part in ("--set", override)]
        + (["--out", str(out)] if out else [])
    )
    with screen.progress_bar() as bar:
        checkpoint = open_checkpoint(read.checkpoint, progress=lambda done, total: bar("reading weights", done, total))
        plan = make_plan(read, checkpoint, command=command)
    if dry_run:
        costs = [cost(case, checkpoint.config) for case in plan.cases]
        if as_json:
            screen.print_json({"cases": [_planned(*pair) for pair in zip(plan.cases, costs, strict=True)]})
        else:
            screen.print_cases(plan, costs)
        return
    results = Results.create(folder, plan)
    display = _Display(results)
    with display.bar:
        run(results, experiment.parent, watch=display, retry_failed=retry_failed)
    failed = results.failed()
    if as_json:
        done = len(plan.cases) - len(failed) - len(results.missing())
        reasons = {case.id: failure.reason for case, failure in failed}
        screen.print_json({"folder": str(folder), "done": done, "failed": reasons})
    else:
        for case, failure in failed:
            screen.print_note(f"Failed: {case}: {failure.reason}")
        screen.print_note(f"Records: {folder}/records")
    if not no_report:
        display.report(folder, quiet=as_json)
    if failed:
        sys.exit(1)


def _planned(case: "Case", cost: "Cost | None") -> dict[str, Any]:
    return {"id": case.id, "kind": case.kind, "settings": case.settings, "cost": None if cost is None else asdict(cost)}


class _Display:
    """Done, running, failed, and the time that is left, judged by the cases done so far."""

    def __init__(self, results: "Results") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from stabilitykit.cli import screen

        self.results = results
        self.failed = len(results.failed())
        self.total = len(results.plan.cases)
        self.done = self.total - self.failed - len(results.missing())
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=screen.messages,
            disable=not screen.messages.is_terminal,
        )
        self.task = self.bar.add_task("cases", total=self.total, completed=self.done + self.failed)
        self.began = time.monotonic()

    def __call__(self, case: "Case", message: dict[str, Any]) -> None:
        self.done += "finished" in message
        self.failed += "failed" in message
        what = f" · {message['what']} {message['done']}/{message['total']}" if "what" in message else ""
        failed = f", {self.failed} failed" if self.failed else ""
        self.bar.update(
            self.task, completed=self.done + self.failed, description=f"{self.done} done{failed} · {case}{what}"
        )

    def report(self, folder: Path, *, quiet: bool) -> None:
        from stabilitykit.cli.report import write

        write(folder, against=None, quiet=quiet)
