"""The headroom of a model that held, kept in a file, and what has changed since then."""

from collections.abc import Iterator
from pathlib import Path

from stabilitykit.errors import MisuseError
from stabilitykit.records.document import read_document, write_document
from stabilitykit.records.gate import Baseline, Difference, Gate
from stabilitykit.words import counted, listed


def baseline_of(gate: Gate) -> Baseline:
    """What later checks are compared with. Raises MisuseError for a check that ran nothing, or that does not hold."""
    if not gate.ran or not gate.holds:
        why = "ran nothing" if not gate.ran else "does not hold"
        raise MisuseError(f"A baseline is made of a check that ran and holds; this one {why}.")
    return Baseline(
        checkpoint=gate.checkpoint,
        sha256=gate.sha256,
        notes=gate.notes,
        command=gate.command,
        versions=gate.versions,
        machine=gate.machine,
        dtype=gate.dtype,
        headroom={one.site: one.headroom for one in gate.headroom},
        prompts={one.name: one.sha256 for one in gate.prompts},
    )


def write_baseline(path: Path, gate: Gate) -> None:
    """Writes `baseline_of` a check; raises as that and `write_json`."""
    write_document(path, baseline_of(gate))


def read_baseline(path: Path) -> Baseline:
    """Raises MisuseError for a file that is none."""
    return read_document(path, Baseline, "a baseline")


def differences(gate: Gate, baseline: Baseline) -> tuple[Difference, ...]:
    """Versions, weights, prompts and the machine that are not what they were: what may explain a loss."""
    return tuple(_differences(gate, baseline))


def _differences(gate: Gate, baseline: Baseline) -> Iterator[Difference]:
    before, now = dict(baseline.versions), dict(gate.versions)
    before |= {"weights": baseline.sha256 or "unknown"} | {key: str(value) for key, value in baseline.machine.items()}
    now |= {"weights": gate.sha256 or "unknown"} | {key: str(value) for key, value in gate.machine.items()}
    asked = {one.name: one.sha256 for one in gate.prompts}
    before |= {f"prompt {name}": value for name, value in baseline.prompts.items()}
    now |= {f"prompt {name}": value for name, value in asked.items()}
    for what in dict.fromkeys((*before, *now)):
        if before.get(what) != now.get(what):
            yield Difference(what=what, before=before.get(what, "none"), now=now.get(what, "none"))


def missing(gate: Gate, baseline: Baseline) -> str:
    """A remark on sites that only the baseline has; empty for none.

    Raises MisuseError where no site is in both, so that nothing can be compared. After a break nothing is compared
    either, but then the check does not hold.
    """
    known = {one.site for one in gate.headroom}
    gone = [site for site in baseline.headroom if site not in known]
    if not gone:
        return ""
    if len(gone) == len(baseline.headroom):
        raise MisuseError(
            "No site of the baseline is one of this model's, so nothing can be compared: it is another model's, or the "
            "code that runs it has changed. Write another one with --write-baseline."
        )
    return f"{counted(len(gone), 'site')} of the baseline did not run ({listed(gone, 3)})"
