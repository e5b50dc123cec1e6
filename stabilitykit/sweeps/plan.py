"""An experiment -> every case, spelled out and checked before the first one runs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.config import GemmaConfig, released
from stabilitykit.errors import MisuseError
from stabilitykit.models.devices import DTYPES, parse_device
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.machine import Examined, provenance_of
from stabilitykit.records.sweep import Case, CaseKind, Plan, Skipped
from stabilitykit.run.prompts import Prompt, Reads, parse_prompt
from stabilitykit.run.prompts import tokens as prompt_tokens
from stabilitykit.sweeps.axes import is_range, is_up_to, longest
from stabilitykit.sweeps.file import Experiment
from stabilitykit.sweeps.texts import prompt_names


def make_plan(experiment: Experiment, checkpoint: Checkpoint, *, command: str) -> Plan:
    """Every case of the experiment on this checkpoint.

    Runs come first, each text's float32 run before those that are compared with it; then ranges of lengths, one dtype
    after the other, so that a model is built once.

    Lengths that a text does not reach are `skipped`, and so is the end of a range.

    Raises MisuseError with the line at fault for a prompt that does not exist, a length beyond the model's context,
    texts that reach none of the lengths, and a device that is not there.
    """
    place = str(parse_device(experiment.device))
    planned = (*_grids(experiment, checkpoint, place), *_others(experiment, checkpoint, place))
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
        config=asdict(checkpoint.config),
        cases=tuple(sorted(cases.values(), key=turn)),
        sections=experiment.sections,
        own_sections=dict(experiment.own_sections),
        format=experiment.format,
        skipped=skipped,
        **provenance_of(checkpoint, command, place),
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


def case_tokens(case: Case, tokenizer: Tokenizer, folder: Path) -> list[int]:
    """The tokens that a case runs: all of a range's longest length. Raises MisuseError as `parse_prompt` does."""
    settings = case.settings
    prompt = parse_prompt(settings["prompt"], folder)
    return _longest_run(prompt, tokenizer, settings["bos"], settings["length"])[: settings["tokens"]]


def _longest_run(prompt: Prompt, tokenizer: Reads, bos: bool, length: int | str) -> list[int]:
    """The tokens of a length's longest run: of "up to N" the whole text, if it is shorter."""
    wanted = longest(length)
    if is_up_to(length) and not prompt.repeats:
        return prompt_tokens(prompt, tokenizer, bos=bos, length=None)[:wanted]
    return prompt_tokens(prompt, tokenizer, bos=bos, length=wanted)


def _grids(experiment: Experiment, checkpoint: Checkpoint, device: str) -> Iterator[Case | Skipped]:
    tokenizer = Tokenizer(checkpoint.vocabulary)
    folder = experiment.path.parent
    for number, settings in _prompted(experiment):
        try:
            prompt = parse_prompt(settings["prompt"], folder)
        except MisuseError as error:
            experiment.fail(str(error), "prompt", "grid", number)
        length, bos = settings["length"], settings["bos"]
        wanted = longest(length)
        _check_context(1 if is_up_to(length) else wanted or 1, checkpoint.config, experiment, "grid", number)
        if wanted is not None and not is_up_to(length) and not prompt.repeats:
            has = len(prompt_tokens(prompt, tokenizer, bos=bos, length=None))
            if has < wanted:
                yield Skipped(prompt=settings["prompt"], bos=bos, length=str(length), tokens=has)
                if not is_range(length):
                    continue
                settings["length"] = f"1..{has}"
        try:
            count = len(_longest_run(prompt, tokenizer, bos, settings["length"]))
        except MisuseError as error:
            experiment.fail(str(error), "prompt" if wanted is None else "length", "grid", number)
        if is_up_to(length):
            count = min(count, checkpoint.config.context)
        _check_context(count, checkpoint.config, experiment, "grid", number)
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


def _others(experiment: Experiment, checkpoint: Checkpoint, device: str) -> Iterator[Case]:
    kinds: tuple[CaseKind, ...] = ("memory", "shortage", "footprint")
    for kind in kinds:
        for number, settings in _products(experiment, kind):
            config = checkpoint.config if kind != "footprint" else released(settings["model"])
            _check_context(settings["length"], config, experiment, kind, number)
            yield Case(kind=kind, settings={"device": device} | settings)


def _products(experiment: Experiment, table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, axes in enumerate(experiment.tables[table]):
        for values in itertools.product(*axes.values()):
            yield number, dict(zip(axes, values, strict=True))


def _check_context(length: int, config: GemmaConfig, experiment: Experiment, table: str, number: int) -> None:
    if length > config.context:
        what = f"A prompt fits the model's context of {config.context:,} tokens; the length {length:,} does not"
        experiment.fail(what, "length", table, number)
