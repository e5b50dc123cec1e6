"""An experiment -> every case, spelled out and checked before the first one runs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from stabilitykit.checkpoints.config import released
from stabilitykit.errors import MisuseError
from stabilitykit.models.devices import DTYPES, parse_device
from stabilitykit.models.machine import Examined, provenance_of
from stabilitykit.records.sweep import Case, CaseKind, Plan, Skipped
from stabilitykit.sweeps.axes import is_range, is_up_to, longest
from stabilitykit.sweeps.file import Experiment
from stabilitykit.sweeps.model import KitModel, SweptModel
from stabilitykit.sweeps.prompts import SweptPrompt
from stabilitykit.sweeps.texts import prompt_names


def make_plan(experiment: Experiment, model: SweptModel, *, command: str) -> Plan:
    """Every case of the experiment on this model.

    Runs come first, each text's float32 run before those that are compared with it; then ranges of lengths, one dtype
    after the other, so that a model is built once.

    Lengths that a text does not reach are `skipped`, and so is the end of a range.

    Raises MisuseError with the line at fault for a prompt that does not exist, a length beyond the model's context, a
    setting that this model has not, texts that reach none of the lengths, and a device that is not there.
    """
    place = str(parse_device(experiment.device))
    planned = (*_grids(experiment, model, place), *_others(experiment, model, place))
    cases = {one.id: one for one in planned if isinstance(one, Case)}
    skipped = tuple(dict.fromkeys(one for one in planned if isinstance(one, Skipped)))
    if skipped and not cases:
        experiment.fail(f"A text reaches one length at least; of these none does: {skipped[0]}", "length", "grid")
    kinds, dtypes = list(get_args(CaseKind)), list(DTYPES)

    def turn(case: Case) -> tuple[int, int]:
        return kinds.index(case.kind), dtypes.index(case.settings["dtype"]) if case.kind == "lengths" else 0

    return Plan(
        name=experiment.path.stem,
        title=experiment.title,
        source=experiment.source,
        config=dict(model.config),
        cases=tuple(sorted(cases.values(), key=turn)),
        sections=experiment.sections,
        own_sections=dict(experiment.own_sections),
        format=experiment.format,
        skipped=skipped,
        **provenance_of(model, command, place),
    )


def plan_without_cases(
    checkpoint: Examined, config: Mapping[str, Any], *, name: str, title: str, command: str, sections: Sequence[str]
) -> Plan:
    """For a folder whose report holds other findings than a sweep's."""
    return Plan(
        name=name,
        title=title,
        source="",
        config=dict(config),
        cases=(),
        sections=tuple(sections),
        **provenance_of(checkpoint, command, "cpu"),
    )


def case_tokens(case: Case, model: SweptModel, folder: Path) -> list[int]:
    """The tokens that a case runs: all of a range's longest length. Raises MisuseError as `SweptPrompt` does."""
    settings = case.settings
    prompt = SweptPrompt.read(settings["prompt"], folder)
    return prompt.tokens(model, bos=settings["bos"], length=settings["tokens"])


def _grids(experiment: Experiment, model: SweptModel, device: str) -> Iterator[Case | Skipped]:
    folder = experiment.path.parent
    for number, settings in _prompted(experiment):
        refused = model.refused(settings)
        if refused is not None:
            experiment.fail(refused, refused.partition(" ")[0], "grid", number)
        try:
            prompt = SweptPrompt.read(settings["prompt"], folder)
        except MisuseError as error:
            experiment.fail(str(error), "prompt", "grid", number)
        length, bos = settings["length"], settings["bos"]
        wanted = longest(length)
        _check_context(1 if is_up_to(length) else wanted or 1, model.context, experiment, "grid", number)
        try:
            has = len(prompt.tokens(model, bos=bos, length=wanted if prompt.repeats else None))
        except MisuseError as error:
            experiment.fail(str(error), "prompt" if wanted is None else "length", "grid", number)
        count = has if wanted is None else min(has, wanted)
        if wanted is not None and has < wanted and not is_up_to(length):
            yield Skipped(prompt=prompt.name, bos=bos, length=str(length), tokens=has)
            if not is_range(length):
                continue
            settings["length"] = f"1..{has}"
        if is_up_to(length):
            count = min(count, model.context)
        _check_context(count, model.context, experiment, "grid", number)
        settings |= {"text_sha256": prompt.sha256, "tokens": count, "device": device}
        if is_range(settings["length"]):
            checks = sorted(n for n in set(experiment.checks) if n <= count)
            yield Case(kind="lengths", settings=settings | {"checks": checks})
        else:
            yield Case(kind="run", settings=settings)


def _prompted(experiment: Experiment) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every product of a [[grid]], with a prompt of its own for each file that a folder or a pattern stands for."""
    for number, settings in _products(experiment, "grid"):
        try:
            names = prompt_names(settings["prompt"], experiment.path.parent)
        except MisuseError as error:
            experiment.fail(str(error), "prompt", "grid", number)
        for name in names:
            yield number, {**settings, "prompt": name}


def _others(experiment: Experiment, model: SweptModel, device: str) -> Iterator[Case]:
    kinds: tuple[CaseKind, ...] = ("memory", "shortage", "footprint")
    for kind in kinds:
        for number, settings in _products(experiment, kind):
            if kind != "footprint" and not isinstance(model, KitModel):
                what = f"[[{kind}]] is of the kit's own model, Gemma 1 to 3, and transformers runs {model.source}"
                experiment.fail(f"{what}; leave the table out", "", kind, number)
            context = model.context if kind != "footprint" else released(settings["model"]).context
            _check_context(settings["length"], context, experiment, kind, number)
            yield Case(kind=kind, settings={"device": device} | settings)


def _products(experiment: Experiment, table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, axes in enumerate(experiment.tables[table]):
        for values in itertools.product(*axes.values()):
            yield number, dict(zip(axes, values, strict=True))


def _check_context(length: int, context: int, experiment: Experiment, table: str, number: int) -> None:
    if length > context:
        what = f"A prompt fits the model's context of {context:,} tokens; the length {length:,} does not"
        experiment.fail(what, "length", table, number)
