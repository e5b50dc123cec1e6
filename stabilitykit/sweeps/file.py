"""An experiment's TOML file, read and checked; every mistake is told with its line and what is allowed there.

title = "Where float16 breaks"
checkpoint = "gemma3-270m"

[[grid]]                      # axes multiply within a table; tables are added to one another
dtype = ["float16", "float32"]
prompt = ["prose", "@mine"]   # a text of the kit's own; every text in the folder `mine`
bos = [true, false]
length = ["1..4096", 128]     # every length up to 4,096; one run of 128 tokens, or "up to 128", recorded in full

[lengths]
checks = [1, 100]             # lengths of a range to run again directly

[[memory]]                    # measured in fresh processes
dtype = ["float16", "float32"]
length = 128

[[shortage]]                  # run in a process that may take less memory than it needs
length = 128
room = [0.25, 0.5]

[[footprint]]                 # computed alone, for a released size
model = "gemma-7b"
length = [128, 8192]

[report]
sections = ["verdict", "lengths", "own.py"]    # the usual ones if left out; own.py is a file beside this one
format = "float16"                             # the number format that values are judged by
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS
from stabilitykit.sweeps.axes import FOOTPRINT, GRID, MEMORY, SHORTAGE, Axis

TABLES: Mapping[str, Mapping[str, Axis]] = {
    "grid": GRID,
    "memory": MEMORY,
    "shortage": SHORTAGE,
    "footprint": FOOTPRINT,
}
"""Tables of axes, by name."""

_TOP = {"title", "checkpoint", "device", "lengths", "report", *TABLES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A file that has been read. `tables` hold, by name, axes and their values: every axis, not yet multiplied.

    `own_sections` are those sections that are Python files beside the experiment, by path, with their SHA-256. Where
    there `is_no_file`, mistakes are told without their line.
    """

    path: Path
    source: str
    title: str
    checkpoint: str
    device: str
    tables: Mapping[str, tuple[dict[str, list[Any]], ...]]
    checks: tuple[int, ...]
    sections: tuple[str, ...]
    own_sections: Mapping[str, str] = field(default_factory=dict)
    format: str = "float16"
    is_no_file: bool = False

    def fail(self, what: str, key: str = "", table: str = "", number: int = 0) -> NoReturn:
        """Raises MisuseError: the line of `key` in the `number`-th such table, and what is wrong there."""
        if self.is_no_file:
            raise MisuseError(f"{what.rstrip('.')}.")
        line = _line(self.source.splitlines(), key, table, number)
        raise MisuseError(f"{self.path}{f', line {line}' if line else ''}: {what.rstrip('.')}.")


def read_experiment(path: Path, overrides: Sequence[str] = (), *, sections: Sequence[str] = ()) -> Experiment:
    """Reads and checks an experiment's file; `sections` are those that a report has, any for none.

    `overrides` are `key=value` with a TOML value, a bare word or several with commas between: an axis is replaced in
    every grid, and `checkpoint`, `device`, `title` or `checks` at the top.

    Raises MisuseError with the line at fault, what is allowed there and what came.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"An experiment is a TOML file in UTF-8; {path} cannot be read as one: {error}.") from None
    return experiment_of(path, source, overrides, sections=sections)


def experiment_of(
    path: Path,
    source: str,
    overrides: Sequence[str] = (),
    *,
    sections: Sequence[str] = (),
    is_no_file: bool = False,
) -> Experiment:
    """As `read_experiment`, of the text of the file `path`, or of what would be it: then it `is_no_file`."""
    try:
        raw = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise MisuseError(f"An experiment is a TOML file, and {path} is not valid TOML: {error}.") from None
    return _Reader(path, source, is_no_file).experiment(raw, overrides, sections)


class _Reader:
    """Turns what TOML holds into an experiment, and says in which line of the file what is wrong."""

    def __init__(self, path: Path, source: str, is_no_file: bool) -> None:
        self.blank = Experiment(
            path=path,
            source=source,
            title=path.stem,
            checkpoint="",
            device="cpu",
            tables={},
            checks=(),
            sections=(),
            is_no_file=is_no_file,
        )
        self.fail = self.blank.fail

    def experiment(self, raw: dict[str, Any], overrides: Sequence[str], sections: Sequence[str]) -> Experiment:
        self._known(raw, _TOP, "", 0)
        tables = {name: self._tables(raw, name) for name in TABLES}
        if not any(tables.values()):
            self.fail("An experiment has at least one [[grid]] of axes; this one has none")
        lengths, report = self._table(raw, "lengths", {"checks"}), self._table(raw, "report", {"sections", "format"})
        for name, axes in TABLES.items():
            for number, table in enumerate(tables[name]):
                self._known(table, set(axes), name, number)
        top = {name: raw.get(name, getattr(self.blank, name)) for name in ("title", "device", "checkpoint")}
        for override in overrides:
            self._override(override, top, tables["grid"], lengths)
        for name, value in top.items():
            if not isinstance(value, str):
                self.fail(f"{name} is a text; {value!r} is none", name)
        if not top["checkpoint"]:
            self.fail('An experiment names its checkpoint, such as checkpoint = "gemma3-270m"', "checkpoint")
        checks = lengths.get("checks", [])
        if not isinstance(checks, list) or not all(type(n) is int and n >= 1 for n in checks):
            self.fail(f"checks are numbers of tokens, from 1 on; {checks!r} are not", "checks", "lengths")
        names = self._sections(report.get("sections", []), sections)
        return Experiment(
            path=self.blank.path,
            source=self.blank.source,
            **top,
            tables={
                name: tuple(
                    {axis: self._values(table, axis, name, number) for axis in TABLES[name]}
                    for number, table in enumerate(own)
                )
                for name, own in tables.items()
            },
            checks=tuple(checks),
            sections=tuple(names),
            own_sections={name: digest for name, digest in names.items() if digest},
            format=self._format(report.get("format", self.blank.format)),
            is_no_file=self.blank.is_no_file,
        )

    def _sections(self, names: Any, allowed: Sequence[str]) -> dict[str, str]:
        """By name, in order, the SHA-256 of each that is a file beside the experiment; empty for those of the kit."""
        if not isinstance(names, list):
            self.fail(f"sections must be a list of names, not {names!r}", "sections", "report")
        found = {}
        for name in names:
            if isinstance(name, str) and name.endswith(".py"):
                path = self.blank.path.parent / name
                try:
                    found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
                except OSError as error:
                    self.fail(f"cannot read the section {name}: {error}", "sections", "report")
            elif isinstance(name, str) and (not allowed or name in allowed):
                found[name] = ""
            else:
                choices = f"{', '.join(allowed)}, or a Python file beside the experiment"
                self.fail(f"unknown section {name!r}; choose one of: {choices}", "sections", "report")
        return found

    def _format(self, name: Any) -> str:
        if name not in list(FORMATS):
            self.fail(f"unknown number format {name!r}; choose one of: {', '.join(FORMATS)}", "format", "report")
        return str(name)

    def _tables(self, raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
        tables = raw.get(name, [])
        tables = [tables] if isinstance(tables, dict) else tables
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.fail(f"[[{name}]] is a table of axes; {tables!r} is none", name)
        return [dict(table) for table in tables]

    def _table(self, raw: dict[str, Any], name: str, keys: set[str]) -> dict[str, Any]:
        table = raw.get(name, {})
        if not isinstance(table, dict):
            self.fail(f"[{name}] must be a table, got {table!r}", name)
        self._known(table, keys, name, 0)
        return dict(table)

    def _known(self, table: Mapping[str, Any], allowed: set[str], where: str, number: int) -> None:
        for key in table:
            if key not in allowed:
                what = "axis" if where in TABLES else "key"
                self.fail(f"unknown {what} {key!r}; choose one of: {', '.join(sorted(allowed))}", key, where, number)

    def _values(self, table: Mapping[str, Any], name: str, where: str, number: int) -> list[Any]:
        axis = TABLES[where][name]
        values = table.get(name, axis.default)
        values = values if isinstance(values, list) else [values]
        if not values:
            self.fail(f"An axis has at least one value; {name} has none", name, where, number)
        read = []
        for value in values:
            try:
                read.append(axis.read(value))
            except (MisuseError, ValueError):
                self.fail(f"{name} is {axis.allowed}; {value!r} is not", name, where, number)
        return list(dict.fromkeys(read))

    def _override(self, text: str, top: dict[str, Any], grids: list[dict[str, Any]], lengths: dict[str, Any]) -> None:
        name, equals, written = text.partition("=")
        name = name.strip()
        if not equals or not (name in GRID or name in top or name == "checks"):
            allowed = ", ".join([*GRID, *sorted(top), "checks"])
            raise MisuseError(f"--set is KEY=VALUE, and KEY one of {allowed}; {text!r} is not.")
        value = _toml_value(written.strip())
        values = value if isinstance(value, list) else [value]
        if name in top:
            top[name] = value
        elif name == "checks":
            lengths[name] = values
        else:
            for one in values:
                try:
                    GRID[name].read(one)
                except (MisuseError, ValueError):
                    raise MisuseError(f"--set {text}: {name} is {GRID[name].allowed}; {one!r} is not.") from None
            for grid in grids:
                grid[name] = values


def _line(lines: Sequence[str], key: str, table: str, number: int) -> int | None:
    """The line that begins with `key =` in the given table, or the table's own; None where there is neither."""
    here, count, fallback = "", -1, None
    for at, line in enumerate(lines, start=1):
        header = re.match(r"\s*\[+\s*([^\]\s]+)\s*\]+", line)
        if header:
            here = header[1]
            count += here == table
            if here in (table, key) and (here not in TABLES or count == number or not table):
                fallback = fallback or at
            continue
        inside = here == table and (table not in TABLES or count == number)
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
