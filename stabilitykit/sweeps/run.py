"""An experiment's file -> its cases, run where they are missing, and the report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stabilitykit.records.sweep import Case, Plan, Results
from stabilitykit.report.make import make_report
from stabilitykit.report.sections import SECTIONS
from stabilitykit.run.case import Progress
from stabilitykit.sweeps.file import Experiment, experiment_of, read_experiment
from stabilitykit.sweeps.model import open_swept
from stabilitykit.sweeps.plan import make_plan
from stabilitykit.sweeps.sweep import sweep as run_cases
from stabilitykit.sweeps.written import as_prompt, experiment_text, title_of

Watcher = Callable[[Results, Case, dict[str, Any]], None]
"""Called with the results so far, the case that runs, and what it says: `what`, `done` and `total`, or `finished`, or
`failed` and `reason`."""


def plan(
    experiment: str | Path | Experiment,
    *,
    overrides: Sequence[str] = (),
    command: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Every case of an experiment, checked; arguments and errors are those of `sweep`."""
    read = _read(experiment, overrides)
    return make_plan(read, open_swept(read.checkpoint, progress), command=command or "")


def _read(experiment: str | Path | Experiment, overrides: Sequence[str]) -> Experiment:
    sections = tuple(SECTIONS)
    if not isinstance(experiment, Experiment):
        return read_experiment(Path(experiment), overrides, sections=sections)
    if not overrides:
        return experiment
    return experiment_of(
        experiment.path, experiment.source, overrides, sections=sections, is_no_file=experiment.is_no_file
    )


def without_file(
    checkpoint: str,
    *,
    prompts: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    lengths: Sequence[int | str] = (),
) -> Experiment:
    """What `experiment_text` writes, as if the file lay where the command runs. Raises as `read_experiment` does."""
    name = title_of(checkpoint)
    folder = Path()
    told = [as_prompt(one, folder) for one in prompts]
    text = experiment_text(f"{name}.toml", checkpoint, prompts=told, dtypes=dtypes, lengths=lengths)
    return experiment_of(folder / f"{name}.toml", text, sections=tuple(SECTIONS), is_no_file=True)


def sweep(
    experiment: str | Path | Experiment,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    retry_failed: bool = False,
    report: bool = True,
    command: str | None = None,
    watch: Watcher | None = None,
    progress: Progress | None = None,
) -> Results:
    """Runs an experiment's cases, keeps each on disk as it finishes, and writes the report.

    Called again, it runs only what is missing. Each case runs in a process of its own, so that one that fails, or runs
    out of memory, is recorded as failed and the rest goes on.

    Args:
        experiment: the TOML file, or what `read_experiment` or `without_file` made.
        overrides: KEY=VALUE in place of the file's, such as "dtype=float16" or "length=16,64".
        out: the folder for results and report; reports/NAME unless given, NAME being that of the file.
        retry_failed: run cases again that failed before.
        report: write report.html, report.md, figures and tables.
        command: the command line to name in the report, if there was one.
        watch: called with the results, the case that runs and what it says.
        progress: called with (what, done, total) while weights are read and the report is drawn.

    Returns:
        Results: `failed()` and `missing()` cases, `runs()` with their recordings, `length_maps()` and so on.

    Raises:
        MisuseError: for a mistake in the file, with its line and what is allowed there; for a folder that holds another
            experiment's results, or in which another sweep runs.
        StabilityKitError: where no case can be started.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "tiny.toml"
    ...     text = 'checkpoint = "random:gemma3-270m?layers=1&vocabulary=512"\\n[[footprint]]\\nlength = [8, 16]\\n'
    ...     _ = file.write_text(text)
    ...     results = sweep(file, out=f"{folder}/out", report=False)
    ...     [case.settings["length"] for case, _ in results.footprints()], results.failed()
    ([8, 16], [])
    """
    read = _read(experiment, overrides)
    planned = plan(read, command=command, progress=progress)
    results = Results.create(Path(out) if out is not None else Path("reports") / read.path.stem, planned)

    def told(case: Case, message: dict[str, Any]) -> None:
        if watch is not None:
            watch(results, case, message)

    run_cases(results, read.path.parent, watch=told, retry_failed=retry_failed)
    if report:
        make_report(results.folder, progress=progress)
    return results
