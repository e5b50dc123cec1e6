"""`stabilitykit sweep`: run an experiment's cases, those that are missing, and write the report."""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import stabilitykit.cli.options as options
from stabilitykit.commands import line
from stabilitykit.errors import MisuseError

if TYPE_CHECKING:
    from stabilitykit.records.sweep import Case, Results
    from stabilitykit.sweeps.cost import Cost
    from stabilitykit.sweeps.file import Experiment


def sweep(
    experiment: Annotated[
        str | None,
        typer.Argument(
            help="TOML file of the experiment, or a checkpoint, with --prompts, in place of one.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a checkpoint: text file, folder of them (.txt, .md) or pattern such as 'texts/*.txt', or a text "
            "of the kit's own such as prose; repeatable.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a checkpoint: dtype to run in; repeatable. float16 and float32 if not given.", show_default=False
        ),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a checkpoint: a number of tokens, 'up to 2000', a range such as 1..64, or all; repeatable. "
            "'up to 512' if not given.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="New TOML file to write, with comments, for the experiment that would run; runs nothing.",
            show_default=False,
        ),
    ] = None,
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

    axes = _axes(prompts, dtype, length)
    if init is not None:
        _init(init, experiment, axes, as_json)
        return
    chosen = _experiment(experiment, axes)
    if dry_run:
        _print_plan(chosen, overrides or (), as_json)
        return
    from stabilitykit.sweeps.run import sweep as run

    display = _Display()
    with display.bar, closing(display.stages):
        results = run(
            chosen,
            overrides=overrides or (),
            out=out,
            retry_failed=retry_failed,
            report=False,
            command=options.command_line(),
            watch=display,
            progress=lambda what, done, total: display.stages(what),
        )
    failed = results.failed()
    if as_json:
        done = len(results.plan.cases) - len(failed) - len(results.missing())
        reasons = {case.id: failure.reason for case, failure in failed}
        skipped = [asdict(one) for one in results.plan.skipped]
        screen.print_json({"folder": str(results.folder), "done": done, "failed": reasons, "skipped": skipped})
    else:
        for one in results.plan.skipped:
            screen.print_note(f"{one}.")
        for case, failure in failed:
            screen.print_note(f"Failed: {case}: {failure.reason}")
        screen.print_note(f"Records: {results.folder}/records")
    if not no_report:
        from stabilitykit.cli.report import write

        write(results.folder, against=None, quiet=as_json)
    if failed:
        sys.exit(1)


def _axes(prompts: list[str] | None, dtype: list[str] | None, length: list[str] | None) -> dict[str, Any]:
    """Those that were given."""
    from stabilitykit.sweeps.written import as_length

    lengths = None if length is None else [as_length(one) for one in length]
    return {name: given for name, given in (("prompts", prompts), ("dtypes", dtype), ("lengths", lengths)) if given}


def _experiment(named: str | None, axes: dict[str, Any]) -> "Path | Experiment":
    """The file that was named, or what takes its place."""
    if named is None:
        raise MisuseError(
            "A sweep runs an experiment: a TOML file, which `stabilitykit sweep --init FILE` writes, or a checkpoint "
            "with --prompts."
        )
    if named.endswith(".toml"):
        if axes:
            raise MisuseError(
                f"--prompts, --dtype and --length are for a checkpoint; {named} has its own. Replace them with --set, "
                "such as --set dtype=float16."
            )
        return Path(named)
    if "prompts" not in axes:
        raise MisuseError(
            f"An experiment is a file that ends in .toml; {named} does not. If it is a checkpoint, say what to run it "
            "on, with --prompts FILE, --prompts FOLDER or --prompts prose."
        )
    from stabilitykit.sweeps.run import without_file

    return without_file(named, **axes)


def _init(file: Path, checkpoint: str | None, axes: dict[str, Any], as_json: bool) -> None:
    """Writes the file of an experiment, of the bundled model unless another one is named."""
    from stabilitykit.checkpoints.bundled import BUNDLED
    from stabilitykit.cli import screen
    from stabilitykit.files import write_text
    from stabilitykit.sweeps.written import as_prompt, experiment_text

    if file.exists():
        raise MisuseError(f"{file} exists already; choose another name, or edit what is there.")
    if file.suffix != ".toml":
        raise MisuseError(f"An experiment is a file that ends in .toml; {file} does not.")
    axes = axes | {"prompts": [as_prompt(one, file.parent) for one in axes.get("prompts", ())]}
    write_text(file, experiment_text(str(file), checkpoint or BUNDLED, **axes))
    if as_json:
        screen.print_json({"file": str(file)})
    else:
        screen.print_note(f"Experiment: {file}")
        screen.print_command("To run it", line("sweep", file))


def _print_plan(experiment: "Path | Experiment", overrides: Sequence[str], as_json: bool) -> None:
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
        skipped = [asdict(one) for one in planned.skipped]
        cases = [_planned(*pair) for pair in zip(planned.cases, costs, strict=True)]
        screen.print_json({"cases": cases, "skipped": skipped})
    else:
        screen.print_cases(planned, costs)
        for one in planned.skipped:
            screen.print_note(f"{one}.")


def _planned(case: "Case", cost: "Cost | None") -> dict[str, Any]:
    return {"id": case.id, "kind": case.kind, "settings": case.settings, "cost": None if cost is None else asdict(cost)}


class _Display:
    """Done, running, failed, and the time that is left, judged by the cases so far; off a terminal, a line a case."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from stabilitykit.cli import screen

        self.done = self.failed = 0
        self.stages = screen.Stages()
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
        self.stages(f"case {results.plan.cases.index(case) + 1} of {total}: {case}")
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
