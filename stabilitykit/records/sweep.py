"""The folder of a sweep: what is planned, done and failed; read and written without torch.

    reports/NAME/
      experiment.json          the plan: every case, the checkpoint, the versions it runs with
      records/CASE.parquet     a finished case: a `Recording`, or a `LengthMap` for a range of lengths
      records/CASE.json        a finished measurement, of memory for example
      records/CASE.failed.json the reason why a case failed
      remedies.json            the ranking of remedies that `stabilitykit repair --report` wrote
      bounds.json              the bounds that `stabilitykit bound --report` wrote
      search.json              the prompts and tokens that `stabilitykit search --report` wrote

A file gets its name only when it is complete. Records hold nothing that differs between two runs of the same case, so
a sweep that was interrupted and resumed leaves the same ones.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from stabilitykit.errors import MisuseError
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records.bounds import Bounds
from stabilitykit.records.document import from_document, read_document, write_document
from stabilitykit.records.lengths import LengthMap
from stabilitykit.records.provenance import CheckpointProvenance
from stabilitykit.records.recording import Recording
from stabilitykit.records.remedies import Ranking
from stabilitykit.records.search import Search
from stabilitykit.words import counted

Finding = Ranking | Bounds | Search
"""A command's result about a checkpoint, kept beside a sweep of it."""

_FINDINGS: Mapping[type[Finding], str] = {Ranking: "remedies.json", Bounds: "bounds.json", Search: "search.json"}
_F = TypeVar("_F", Ranking, Bounds, Search)
_M = TypeVar("_M")

CaseKind = Literal["run", "lengths", "memory", "shortage", "footprint"]
FailureKind = Literal["raised", "out of memory", "killed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cell of an experiment: a value for each axis.

    Kind "run" is one recorded forward pass and sampling step; its result is a `Recording`. "lengths" is a range
    of lengths; its result is a `LengthMap`. "memory" is a fresh process whose peak is measured; its result is a
    `Memory`. "shortage" is a process that may take less memory than it needs; its result is a `Shortage`.
    "footprint" is computed alone, for a released size; its result is a `Footprint`. A reference run is a "run" whose
    dtype is float32.
    """

    kind: CaseKind
    settings: dict[str, Any]

    @property
    def runs_prompt(self) -> bool:
        """Whether it runs a text and records its values; other cases measure memory only."""
        return self.kind in ("run", "lengths")

    @property
    def id(self) -> str:
        """A file name that is the same for equal settings and differs for others.

        Settings since `_IN_EVERY_ID` are left out where they are usual: cases keep their ids when an axis is added.
        """
        told = {name: value for name, value in self.settings.items() if name in _IN_EVERY_ID or not _usual(name, value)}
        words = [self.kind, *(f"{name}={value}" for name, value in told.items() if name in _IN_NAME)]
        readable = re.sub(r"[^A-Za-z0-9.=-]+", "-", "_".join(words)).strip("-")[:80]
        digest = hashlib.sha256(json.dumps([self.kind, told], sort_keys=True).encode()).hexdigest()
        return f"{readable}-{digest[:10]}"

    @property
    def unusual(self) -> dict[str, Any]:
        """The settings without those that have their usual values: what tells it from others, whoever planned them."""
        return {name: value for name, value in self.settings.items() if not _usual(name, value)}

    def __str__(self) -> str:
        told = {name: value for name, value in self.unusual.items() if name in _IN_NAME and value != "all"}
        return " ".join(_spoken(name, value) for name, value in told.items())


USUAL: Mapping[str, Any] = {
    "rescale": 1.0,
    "level": "operators",
    "rounding": "transformers",
    "temperature": 1.0,
    "seed": 0,
    "matmul": "auto",
}
"""The usual values of settings, which are left out of a case's description."""

_IN_EVERY_ID = ("rescale", "level", "rounding", "temperature", "seed", "matmul")
"""What is part of an id even where it is usual: the settings of the files that are there. New ones are not added."""

_IN_NAME = ("model", "prompt", "length", "bos", "dtype", "room", *USUAL)


def _usual(name: str, value: Any) -> bool:
    return name in USUAL and USUAL[name] == value


def _spoken(name: str, value: Any) -> str:
    if name == "bos":
        return "with <bos>" if value else "without <bos>"
    if name in ("model", "prompt", "dtype"):
        return str(value)
    if name == "length":
        return "1 token" if value == 1 else f"{value} tokens"
    return f"{name} {value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A case that did not finish; `reason` is a sentence."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of one prefill of `length` tokens in `dtype` on `device`, computed from the config.

    `weights`, `cache` (keys and values) and `activations` are each the most that is allocated at once.
    """

    dtype: str
    length: int
    device: str
    weights: int
    cache: int
    activations: int

    @property
    def computed(self) -> int:
        return self.weights + self.cache + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Footprint):
    """A footprint, and the memory that a fresh process took [bytes].

    `libraries` was resident before the process read a checkpoint, `peak` is the most while the model ran; both are of
    the `device`'s own memory where it has some.
    """

    libraries: int
    peak: int

    @property
    def error(self) -> float:
        """(computed - measured) / measured, both without the libraries; positive where too much was computed."""
        measured = self.peak - self.libraries
        return (self.computed - measured) / measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """The outcome of one prefill that had `room` bytes of free memory for what it needs beside the weights.

    `needed` is computed [bytes]. `outcome`: the logits were "finite" or "not finite", the pass "raised" an error, whose
    type and first line are in `reason`, or its process was "killed" by the signal that `reason` names.
    """

    dtype: str
    length: int
    device: str
    needed: int
    room: int
    outcome: Literal["finite", "not finite", "raised", "killed"]
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A `length` of an experiment that a text does not reach: it has `tokens`, with `<bos>` or without.

    Of a range those lengths are skipped that are longer than the text.
    """

    prompt: str
    bos: bool
    length: str
    tokens: int

    def __str__(self) -> str:
        has = f"{self.prompt} has {counted(self.tokens, 'token')} {_spoken('bos', self.bos)}"
        what = "a run of" if self.length.isdecimal() else "the rest of"
        return f"{has}, so {what} {_spoken('length', self.length)} is skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(CheckpointProvenance):
    """An experiment with all its cases; `source` is the text of its TOML file, `config` the model's sizes.

    `sections` are those of its report. `own_sections` are those of them that are Python files of the experiment's own,
    by path (relative to where the sweep was started, if the experiment was), with their SHA-256. `format` is the number
    format that the report judges values by. `skipped` are lengths that no case has, because the text is shorter.
    """

    name: str
    title: str
    source: str
    config: dict[str, Any]
    cases: tuple[Case, ...]
    sections: tuple[str, ...]
    own_sections: dict[str, str] = field(default_factory=dict)
    format: str = "float16"
    skipped: tuple[Skipped, ...] = ()
    schema: int = 1

    def differences(self, other: "Plan") -> list[str]:
        """Why the results of two plans must not be mixed, in words; empty where they may be."""
        found = [
            f"{what} was {theirs} and is {ours}"
            for what, ours, theirs in (
                ("the checkpoint", self.checkpoint, other.checkpoint),
                ("the checkpoint's SHA-256", self.sha256[:12], other.sha256[:12]),
                *((name, self.versions.get(name), other.versions.get(name)) for name in sorted(self.versions)),
                *((name, self.machine.get(name), other.machine.get(name)) for name in sorted(self.machine)),
            )
            if ours != theirs
        ]
        new, old = {case.id for case in self.cases}, {case.id for case in other.cases}
        if new != old:
            found.append(f"{counted(len(new - old), 'case')} added and {len(old - new)} removed")
        return found


@dataclass(slots=True)
class Results:
    """A sweep's folder. Results are read on demand, and cached."""

    folder: Path
    plan: Plan
    _recordings: dict[str, Recording] = field(default_factory=dict, repr=False)
    _lengths: dict[str, LengthMap] = field(default_factory=dict, repr=False)
    _found: dict[type, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Results":
        """Raises MisuseError where `folder` holds no sweep, or one with another schema version."""
        path = folder / "experiment.json"
        if not path.is_file():
            raise MisuseError(
                f"{folder} has no experiment.json, so it is not a sweep's folder. Make one with `stabilitykit sweep`."
            )
        return cls(folder, read_document(path, Plan, "an experiment's plan"))

    @classmethod
    def create(cls, folder: Path, plan: Plan) -> "Results":
        """The folder for this plan, created if it does not exist.

        Raises MisuseError where it holds the results of another plan, saying what differs, or anything else.
        """
        if (folder / "experiment.json").exists():
            found = cls.open(folder)
            differences = plan.differences(found.plan)
            if differences:
                raise MisuseError(
                    f"{folder} holds the results of another experiment: {'; '.join(differences)}. Choose another "
                    "folder with --out, or remove this one."
                )
        elif (folder / "records").exists():
            raise MisuseError(f"{folder}/records exists without an experiment.json. Choose another folder with --out.")
        write_document(folder / "experiment.json", plan)
        return cls(folder, plan)

    @property
    def form(self) -> NumberFormat:
        """The number format that the report judges values by."""
        return number_format(self.plan.format)

    def path(self, case: Case) -> Path:
        """The file of the case's result, whether it exists yet or not."""
        return self.folder / "records" / f"{case.id}.{'parquet' if case.runs_prompt else 'json'}"

    def _failure_path(self, case: Case) -> Path:
        return self.folder / "records" / f"{case.id}.failed.json"

    def is_done(self, case: Case) -> bool:
        return self.path(case).exists()

    def failure(self, case: Case) -> Failure | None:
        path = self._failure_path(case)
        return from_document(Failure, json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def missing(self) -> list[Case]:
        """Cases that are neither done nor failed, in the plan's order."""
        return [case for case in self.plan.cases if not self.is_done(case) and self.failure(case) is None]

    def failed(self) -> list[tuple[Case, Failure]]:
        found = [(case, self.failure(case)) for case in self.plan.cases if not self.is_done(case)]
        return [(case, failure) for case, failure in found if failure is not None]

    def write_failure(self, case: Case, failure: Failure) -> None:
        write_document(self._failure_path(case), failure)

    def forget_failure(self, case: Case) -> None:
        self._failure_path(case).unlink(missing_ok=True)

    def write(self, case: Case, result: Footprint | Shortage) -> None:
        """Writes the result of a case of kind "memory", "shortage" or "footprint"."""
        write_document(self.path(case), result)

    def recording(self, case: Case) -> Recording:
        if case.id not in self._recordings:
            self._recordings[case.id] = Recording.load(self.path(case))
        return self._recordings[case.id]

    def length_map(self, case: Case) -> LengthMap:
        if case.id not in self._lengths:
            self._lengths[case.id] = LengthMap.load(self.path(case))
        return self._lengths[case.id]

    def runs(self) -> Iterator[tuple[Case, Recording]]:
        """The finished cases of kind "run", in the plan's order."""
        return ((case, self.recording(case)) for case in self._done("run"))

    def length_maps(self) -> Iterator[tuple[Case, LengthMap]]:
        """The finished cases of kind "lengths", in the plan's order."""
        return ((case, self.length_map(case)) for case in self._done("lengths"))

    def memories(self) -> Iterator[tuple[Case, Memory]]:
        """The finished cases of kind "memory", in the plan's order."""
        return ((case, self._read(case, Memory)) for case in self._done("memory"))

    def shortages(self) -> Iterator[tuple[Case, Shortage]]:
        """The finished cases of kind "shortage", in the plan's order."""
        return ((case, self._read(case, Shortage)) for case in self._done("shortage"))

    def footprints(self) -> Iterator[tuple[Case, Footprint]]:
        """The finished cases of kind "footprint", in the plan's order."""
        return ((case, self._read(case, Footprint)) for case in self._done("footprint"))

    @property
    def ranking(self) -> Ranking | None:
        """The ranking of the checkpoint's remedies; None where they were not ranked."""
        return self._finding(Ranking)

    @property
    def bounds(self) -> Bounds | None:
        """The bounds of the checkpoint's tensors; None where they were not computed."""
        return self._finding(Bounds)

    @property
    def search(self) -> Search | None:
        """The prompts found with the least headroom; None where there was no search."""
        return self._finding(Search)

    def write_finding(self, found: Finding) -> None:
        """Raises MisuseError for the result of another checkpoint."""
        self.check_checkpoint(found.checkpoint, found.sha256)
        write_document(self.folder / _FINDINGS[type(found)], found)
        self._found.pop(type(found), None)

    def _finding(self, kind: type[_F]) -> _F | None:
        path = self.folder / _FINDINGS[kind]
        if kind not in self._found and path.exists():
            self._found[kind] = read_document(path, kind, f"what {path.name} holds")
        return self._found.get(kind)

    def check_checkpoint(self, source: str, sha256: str) -> None:
        """Raises MisuseError unless the sweep is of that checkpoint."""
        if sha256 != self.plan.sha256:
            raise MisuseError(
                f"{self.folder} is about another checkpoint: {self.plan.checkpoint} with the SHA-256 "
                f"{self.plan.sha256[:12]}, while {source} has {sha256[:12]}. Choose another folder."
            )

    def _read(self, case: Case, kind: type[_M]) -> _M:
        return from_document(kind, json.loads(self.path(case).read_text(encoding="utf-8")))

    def reference(self, case: Case) -> Recording | None:
        """The recording of the same case in float32, or None where there is none."""
        wanted = Case(kind=case.kind, settings=case.settings | {"dtype": "float32"})
        return self.recording(wanted) if self.path(wanted).exists() else None

    def _done(self, kind: CaseKind) -> list[Case]:
        return [case for case in self.plan.cases if case.kind == kind and self.is_done(case)]
