"""An experiment -> every case, spelled out and checked before the first one runs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from stabilitykit.checkpoints.config import released
from stabilitykit.errors import MisuseError
from stabilitykit.models.devices import DTYPES, parse_device
from stabilitykit.models.machine import Examined, provenance_of
from stabilitykit.records.sweep import Case, CaseKind, Plan
from stabilitykit.sweeps.axes import is_range, longest
from stabilitykit.sweeps.file import Experiment
from stabilitykit.sweeps.model import KitModel, SweptModel
from stabilitykit.sweeps.prompts import sha256_of, tokens_of


def make_plan(experiment: Experiment, model: SweptModel, *, command: str) -> Plan:
    """Every case of the experiment on this model.

    Runs come first, each text's float32 run before those that are compared with it; then ranges of lengths, one dtype
    after the other, so that a model is built once.

    Raises MisuseError with the line at fault for a prompt that does not exist or is too short, a length beyond the
    model's context, a setting that this model has not, and a device that is not there.
    """
    place = str(parse_device(experiment.device))
    cases = {case.id: case for case in (*_grids(experiment, model, place), *_others(experiment, model, place))}
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
    """The tokens that a case runs: all of a range's longest length. Raises MisuseError as `tokens_of` does."""
    settings = case.settings
    return tokens_of(
        settings["prompt"],
        folder,
        model.tokenizer,
        model.chat,
        bos=settings["bos"],
        length=longest(settings["length"]),
    )


def _grids(experiment: Experiment, model: SweptModel, device: str) -> Iterator[Case]:
    folder = experiment.path.parent
    for number, settings in _products(experiment, "grid"):
        refused = model.refused(settings)
        if refused is not None:
            experiment.fail(refused, refused.partition(" ")[0], "grid", number)
        try:
            text_sha256 = sha256_of(settings["prompt"], folder)
        except MisuseError as error:
            experiment.fail(str(error), "prompt", "grid", number)
        wanted = longest(settings["length"])
        _check_context(wanted or 1, model.context, experiment, "grid", number)
        try:
            count = len(case_tokens(Case(kind="run", settings=settings), model, folder))
        except MisuseError as error:
            experiment.fail(str(error), "prompt" if wanted is None else "length", "grid", number)
        _check_context(count, model.context, experiment, "grid", number)
        settings |= {"text_sha256": text_sha256, "tokens": count, "device": device}
        if is_range(settings["length"]):
            checks = sorted(n for n in set(experiment.checks) if n <= count)
            yield Case(kind="lengths", settings=settings | {"checks": checks})
        else:
            yield Case(kind="run", settings=settings)


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
