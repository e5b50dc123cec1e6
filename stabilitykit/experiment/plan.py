"""An experiment's TOML file -> every case, spelled out and checked before the first one runs.

title = "Where float16 breaks"
checkpoint = "gemma3-270m"

[[grid]]                      # axes multiply within a grid; a grid is added to the others
dtype = ["float16", "float32"]
prompt = "prose"
bos = [true, false]
length = ["1..4096", 128]     # every length up to 4,096; one run of 128 tokens, recorded in full

[lengths]
checks = [1, 100]             # lengths of a range to run again directly

[memory]                      # measured in fresh processes; axes multiply here too
dtype = ["float16", "float32"]
length = [128]

[report]
sections = ["verdict", "lengths"]    # all of them if left out
"""

import itertools
import json
import math
import os
import platform
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.experiment.prompts import parse_prompt
from stabilitykit.experiment.prompts import tokens as prompt_tokens
from stabilitykit.gemma.load import DTYPES, parse_device
from stabilitykit.gemma.matmul import Matmul
from stabilitykit.gemma.model import ROUNDINGS
from stabilitykit.gemma.stress import check_gamma
from stabilitykit.gemma.tokenizer import Tokenizer
from stabilitykit.records import Level
from stabilitykit.results import Case, Plan

_RANGE = re.compile(r"1\.\.([1-9][0-9]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """`read` gives the value as a case keeps it, and raises ValueError for one that is not `allowed`."""

    default: Any
    allowed: str
    read: Callable[[Any], Any]


def _one_of(names: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return read


def _length(value: Any) -> int | str:
    if value == "all" or (isinstance(value, str) and _RANGE.fullmatch(value)):
        return str(value)
    return _whole(value, least=1)


def _whole(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _stress(value: Any) -> float:
    check_gamma(_number(value))
    return float(value)


def _temperature(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _dtype(value: Any) -> str:
    return _one_of(list(DTYPES))(value)


AXES: Mapping[str, Axis] = {
    "prompt": Axis(default="prose", allowed="the name of a text", read=_text),
    "length": Axis(default="all", allowed='a number of tokens, a range "1..4096" of them, or "all"', read=_length),
    "bos": Axis(default=True, allowed="true or false", read=_flag),
    "dtype": Axis(default="float16", allowed=" or ".join(DTYPES), read=_dtype),
    "stress": Axis(default=1.0, allowed="a power of two from 2^-24 to 2^24", read=_stress),
    "level": Axis(default="operators", allowed=" or ".join(get_args(Level)), read=_one_of(get_args(Level))),
    "rounding": Axis(default="transformers", allowed=" or ".join(ROUNDINGS), read=_one_of(list(ROUNDINGS))),
    "temperature": Axis(default=1.0, allowed="0 (greedy) or a positive number", read=_temperature),
    "seed": Axis(default=0, allowed="a whole number from 0 on", read=_whole),
    "matmul": Axis(
        default="auto",
        allowed=f"auto or {' or '.join(get_args(Matmul))}",
        read=_one_of(["auto", *get_args(Matmul)]),
    ),
}

_MEMORY_AXES = ("dtype", "length")
_TOP = {"title", "checkpoint", "device", "grid", "lengths", "memory", "report"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A file that has been read: axes and their values, not yet multiplied; `grids` hold every axis."""

    path: Path
    source: str
    title: str
    checkpoint: str
    device: str
    grids: tuple[dict[str, list[Any]], ...]
    checks: tuple[int, ...]
    memory: dict[str, list[Any]]
    sections: tuple[str, ...] | None
    overrides: tuple[str, ...]


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads and checks an experiment's file.

    `overrides` are `key=value` with a TOML value, a bare word or several with commas between: an axis is replaced in
    every grid, and `checkpoint`, `device`, `title` or `checks` at the top.

    Raises MisuseError with the line at fault, what is allowed there and what came.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"An experiment is a TOML file in UTF-8; {path} cannot be read as one: {error}.") from None
    try:
        raw = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise MisuseError(f"An experiment is a TOML file, and {path} is not valid TOML: {error}.") from None
    return _Reader(path, source).experiment(raw, overrides)


class _Reader:
    """Reads tables, and says in which line of the file what is wrong."""

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.lines = source.splitlines()
        self.source = source

    def experiment(self, raw: dict[str, Any], overrides: Sequence[str]) -> Experiment:
        self._known(raw, _TOP, "", 0)
        grids = raw.get("grid", [])
        if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
            self.fail("An experiment has at least one [[grid]] of axes; this one has none", "grid")
        lengths, memory, report = (self._table(raw, name) for name in ("lengths", "memory", "report"))
        self._known(lengths, {"checks"}, "lengths", 0)
        self._known(memory, set(_MEMORY_AXES), "memory", 0)
        self._known(report, {"sections"}, "report", 0)
        for number, grid in enumerate(grids):
            self._known(grid, set(AXES), "grid", number)
        top = {"title": raw.get("title", self.path.stem), "device": raw.get("device", "cpu")}
        top["checkpoint"] = raw.get("checkpoint")
        for override in overrides:
            self._override(override, top, grids, lengths)
        if not isinstance(top["checkpoint"], str):
            self.fail('An experiment names its checkpoint, such as checkpoint = "gemma3-270m"', "checkpoint")
        for name in ("title", "device"):
            if not isinstance(top[name], str):
                self.fail(f"{name} is a text; {top[name]!r} is none", name)
        checks = lengths.get("checks", [])
        if not isinstance(checks, list) or not all(type(n) is int and n >= 1 for n in checks):
            self.fail(f"checks are numbers of tokens, from 1 on; {checks!r} are not", "checks", "lengths")
        sections = report.get("sections")
        if sections is not None and not (isinstance(sections, list) and all(isinstance(s, str) for s in sections)):
            self.fail(f"sections are names of the report's sections; {sections!r} are not", "sections", "report")
        read_memory = {name: self._values(memory, name, "memory", 0) for name in _MEMORY_AXES} if memory else {}
        for length in read_memory.get("length", []):
            if not isinstance(length, int):
                self.fail(f"Memory is measured at a number of tokens; {length!r} is none", "length", "memory")
        return Experiment(
            path=self.path,
            source=self.source,
            title=top["title"],
            checkpoint=top["checkpoint"],
            device=top["device"],
            grids=tuple(
                {name: self._values(grid, name, "grid", number) for name in AXES} for number, grid in enumerate(grids)
            ),
            checks=tuple(checks),
            memory=read_memory,
            sections=None if sections is None else tuple(sections),
            overrides=tuple(overrides),
        )

    def fail(self, what: str, key: str = "", table: str = "", number: int = 0) -> None:
        line = self._line(key, table, number)
        raise MisuseError(f"{self.path}{f', line {line}' if line else ''}: {what}.")

    def _table(self, raw: dict[str, Any], name: str) -> dict[str, Any]:
        table = raw.get(name, {})
        if not isinstance(table, dict):
            self.fail(f"[{name}] is a table; {table!r} is none", name)
        return dict(table)

    def _known(self, table: Mapping[str, Any], allowed: set[str], where: str, number: int) -> None:
        for key in table:
            if key not in allowed:
                kind = "An axis" if where == "grid" else "A key here"
                self.fail(f"{kind} is one of {', '.join(sorted(allowed))}; {key!r} is none of them", key, where, number)

    def _values(self, table: Mapping[str, Any], name: str, where: str, number: int) -> list[Any]:
        axis = AXES[name]
        values = table.get(name, axis.default)
        values = values if isinstance(values, list) else [values]
        if not values:
            self.fail(f"An axis has at least one value; {name} has none", name, where, number)
        read = []
        for value in values:
            try:
                read.append(axis.read(value))
            except ValueError:
                self.fail(f"{name} is {axis.allowed}; {value!r} is not", name, where, number)
        return list(dict.fromkeys(read))

    def _override(self, text: str, top: dict[str, Any], grids: list[dict[str, Any]], lengths: dict[str, Any]) -> None:
        name, equals, written = text.partition("=")
        name = name.strip()
        if not equals or not (name in AXES or name in top or name == "checks"):
            allowed = ", ".join([*AXES, *sorted(top), "checks"])
            raise MisuseError(f"--set is KEY=VALUE, and KEY one of {allowed}; {text!r} is not.")
        value = _toml_value(written.strip())
        if name in top:
            top[name] = value
        elif name == "checks":
            lengths[name] = value if isinstance(value, list) else [value]
        else:
            values = value if isinstance(value, list) else [value]
            for one in values:
                try:
                    AXES[name].read(one)
                except ValueError:
                    raise MisuseError(f"--set {text}: {name} is {AXES[name].allowed}; {one!r} is not.") from None
            for grid in grids:
                grid[name] = values

    def _line(self, key: str, table: str, number: int) -> int | None:
        """The line that begins with `key =` in the given table, or the table's own; None where there is neither."""
        here, count, fallback = "", -1, None
        for at, line in enumerate(self.lines, start=1):
            header = re.match(r"\s*\[+\s*([^\]\s]+)\s*\]+", line)
            if header:
                here = header[1]
                count = count + 1 if here == table else count
                if here in (table, key) and (here != "grid" or count == number or not table):
                    fallback = fallback or at
                continue
            inside = here == table and (table != "grid" or count == number)
            if inside and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
                return at
        return fallback


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) == 1:
            return text
        return [_toml_value(part) for part in parts]


def make_plan(experiment: Experiment, checkpoint: Checkpoint, *, command: str) -> Plan:
    """Every case of the experiment on this checkpoint, references before what is compared with them.

    Raises MisuseError with the line at fault for a prompt that does not exist or is too short, a length beyond the
    model's context, and a device that is not there.
    """
    reader = _Reader(experiment.path, experiment.source)
    place = str(parse_device(experiment.device))
    tokenizer = Tokenizer(checkpoint.vocabulary)
    cases: dict[str, Case] = {}
    for number, grid in enumerate(experiment.grids):
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            try:
                case = _case(experiment, settings, checkpoint, tokenizer, place)
            except MisuseError as error:
                key = "length" if "length" in str(error) or "context" in str(error) else "prompt"
                reader.fail(str(error).rstrip("."), key, "grid", number)
                raise
            cases[case.id] = case
    for dtype, length in itertools.product(*experiment.memory.values()) if experiment.memory else ():
        _check_context(length, checkpoint, lambda what: reader.fail(what, "length", "memory"))
        case = Case(kind="memory", settings={"dtype": dtype, "length": length, "device": place})
        cases[case.id] = case
    # By what they share: the same text in the reference's dtype comes first, so that the rest is compared with it.
    ordered = sorted(cases.values(), key=lambda case: ("run", "lengths", "memory").index(case.kind))
    return Plan(
        name=experiment.path.stem,
        title=experiment.title,
        command=command,
        source=experiment.source,
        checkpoint=checkpoint.source,
        sha256=checkpoint.sha256,
        config=asdict(checkpoint.config),
        notes=checkpoint.notes,
        cases=tuple(ordered),
        sections=experiment.sections or (),
        versions={name: version(name) for name in ("stabilitykit", "torch")} | {"python": platform.python_version()},
        machine={
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(place) if place.startswith("cuda") else place,
        },
    )


def case_tokens(case: Case, tokenizer: Tokenizer, folder: Path) -> list[int]:
    """The tokens that a case runs: all of a range's longest length. Raises MisuseError as `parse_prompt` does."""
    prompt = parse_prompt(case.settings["prompt"], folder)
    return prompt_tokens(prompt, tokenizer, bos=case.settings["bos"], length=longest(case.settings["length"]))


def longest(length: int | str) -> int | None:
    """The number of tokens of a length's longest run; None for "all"."""
    found = _RANGE.fullmatch(str(length))
    if found:
        return int(found[1])
    return None if length == "all" else int(length)


def _case(
    experiment: Experiment, settings: dict[str, Any], checkpoint: Checkpoint, tokenizer: Tokenizer, device: str
) -> Case:
    def fail(what: str) -> None:
        raise MisuseError(what)

    prompt = parse_prompt(settings["prompt"], experiment.path.parent)
    wanted = longest(settings["length"])
    if wanted is not None:
        _check_context(wanted, checkpoint, fail)
    count = len(prompt_tokens(prompt, tokenizer, bos=settings["bos"], length=wanted))
    _check_context(count, checkpoint, fail)
    resolved = {"text_sha256": prompt.sha256, "tokens": count, "device": device}
    kind = "lengths" if _RANGE.fullmatch(str(settings["length"])) else "run"
    if kind == "lengths":
        resolved["checks"] = sorted(n for n in set(experiment.checks) if n <= count)
    return Case(kind="lengths" if kind == "lengths" else "run", settings=settings | resolved)


def _check_context(length: int, checkpoint: Checkpoint, fail: Callable[[str], None]) -> None:
    if length > checkpoint.config.context:
        fail(
            f"A prompt fits the model's context of {checkpoint.config.context:,} tokens; the length {length:,} does not"
        )


def describe(plan: Plan) -> str:
    """A plan as JSON, for scripts."""
    return json.dumps({"cases": [asdict(case) | {"id": case.id} for case in plan.cases]}, ensure_ascii=False, indent=1)


def with_sections(plan: Plan, allowed: Sequence[str]) -> Plan:
    """The plan with every section spelled out. Raises MisuseError for one that no report has."""
    for name in plan.sections:
        if name not in allowed:
            raise MisuseError(f"A report's section is one of {', '.join(allowed)}; {name!r} is none of them.")
    return replace(plan, sections=plan.sections or tuple(allowed))
