"""A folder with the operator that broke first: its operands, cut, and a script that runs it without the kit."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from stabilitykit.diagnosis.outcome import Outcome, decisive
from stabilitykit.diagnosis.places import where
from stabilitykit.diagnosis.sentences import first_sentence
from stabilitykit.errors import MisuseError
from stabilitykit.files import check_new, new_folder
from stabilitykit.recorder.repro import script
from stabilitykit.recorder.repro.cut import cut, does
from stabilitykit.recorder.repro.holds import absorbs, breaks_as, breaks_somehow, result_of, saturates
from stabilitykit.recorder.repro.keep import Kept
from stabilitykit.recorder.repro.operation import Operation
from stabilitykit.recorder.tensors import aside
from stabilitykit.records import Recording
from stabilitykit.words import counted, place

NAME = "repro.py"


class Export:
    """Writes operators alone. `operands` are those that were kept, by the order of their records."""

    def __init__(self, operands: Mapping[int, Kept]) -> None:
        self._operands = operands

    def write(self, recording: Recording, folder: Path, *, redact: bool) -> Path:
        """As `Recording.export_repro`."""
        check_new(folder)
        found = decisive(recording)
        if found is None:
            raise MisuseError("Nothing broke in this recording, so there is no operator to write.")
        with aside():
            least = _cut(recording, found, self._kept(recording, found))
            absorbing = self._absorbing(found)
            wide = _runs_wide(least)
            source = script.body(least, absorbing, wide=wide)
            told = _told(recording, found, redact=redact)
            told.append(_cut_words(least))
            tensors = script.named(least)
            if absorbing is not None:
                tensors |= script.named(absorbing, absorbing=True)
            with new_folder(folder) as beside:
                save_file(tensors, beside / script.FILE)
                (beside / script.FILE).chmod(0o644)  # as what is written beside it
                printed = script.runs(source, str(beside / NAME))
                (beside / NAME).write_text(script.docstring(told, printed) + source, encoding="utf-8")
        return folder / NAME

    def _kept(self, recording: Recording, found: Outcome) -> Operation:
        """The operator with its operands, on the device that it ran on. Raises MisuseError where it is not there."""
        first = found.broke
        if first.is_gradient:
            raise MisuseError(
                "What broke first is a gradient. Derivatives run inside autograd, where no operands are kept: only "
                "what breaks in a forward pass can be written."
            )
        kept = self._operands.get(first.order, "its operands were not at hand when it was found out")
        if isinstance(kept, str):
            level = recording.header.level
            more = "" if level == "operators" else f"; level {level!r} sees no operators, level 'operators' does"
            raise MisuseError(f"What broke first, in {where(first)}, cannot be run alone: {kept}{more}.")
        return kept.moved(kept.device)

    def _absorbing(self, found: Outcome) -> Operation | None:
        """The operator that made finite numbers of what broke, cut; None where nothing did, or its operands are not
        there.
        """
        kept = None if found.ending is None else self._operands.get(found.ending.record.order)
        if not isinstance(kept, Operation) or (found.ending is not None and found.ending.record is found.broke):
            return None
        whole = kept.moved(kept.device)
        return cut(whole, absorbs) if does(whole, absorbs) else None


def _cut(recording: Recording, found: Outcome, whole: Operation) -> Operation:
    """The fewest operands that break alike. Raises MisuseError where the operator does not break alone."""
    first = found.broke
    assert first.broke is not None
    if does(whole, saturates):
        return cut(whole, saturates)
    lost = result_of(whole)
    if lost is None:
        matmul = recording.header.matmul
        more = (
            "" if matmul == "native" else f" The run computed matrix products as {matmul}, which torch alone does not."
        )
        raise MisuseError(f"What broke first, in {where(first)}, does not break where its operator runs alone.{more}")
    number, value = lost
    whole, alike = whole.giving(number), breaks_as(first.broke.kind, value)
    return cut(whole, alike if does(whole, alike) else breaks_somehow)


def _runs_wide(operation: Operation) -> bool:
    """Whether float64 has a kernel of the operator."""
    complex_ = any(tensor.is_complex() for tensor in operation.tensors.values())
    return not complex_ and does(operation.in_float64(), lambda one: bool(one.outputs()))


def _told(recording: Recording, found: Outcome, *, redact: bool) -> list[str]:
    """What broke and what became of it, and what ran; without a word that is not the kit's where it is to redact."""
    header, first, ending = recording.header, found.broke, found.ending
    assert first.broke is not None
    if redact:
        at = f" in {place(first)}" if first.label else ""
        what = f"What broke first{at} is of the kind {first.broke.kind!r}, in {first.dtype}"
    else:
        what = first_sentence(recording, first)
    told = [what if what.endswith(".") else f"{what[0].upper()}{what[1:]}."]
    if ending is not None:
        told[0] += " It is absorbed." if redact else f" It is absorbed in {where(ending.record)}: {ending.how}."
    of = "" if redact or header.checkpoint is None else f" of {header.checkpoint}"
    told.append(f"Written from a run{of} on {header.device}: {script.versions(header.versions)}.")
    return told


def _cut_words(least: Operation) -> str:
    elements = sum(tensor.numel() for tensor in least.tensors.values())
    if elements == least.elements:
        return f"Below, that operator of torch's runs alone on what it was given, {counted(elements, 'element')}."
    few = f"{elements:,} of the {least.elements:,} elements that it was given"
    return f"Below, that operator of torch's runs alone on {few}: as few as were found to break it in the same way."
