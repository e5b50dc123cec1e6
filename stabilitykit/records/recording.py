"""A run's records and what has to be known to read them: the only bridge from measuring to reporting.

Nothing here needs torch, so a recording can be read and explained years later on any machine. The file is
Parquet: one row a tensor, and the header as JSON under the schema's metadata key `stabilitykit`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pyarrow as pa

from stabilitykit.choices import Level
from stabilitykit.errors import MisuseError
from stabilitykit.records.document import from_document
from stabilitykit.records.parquet import SCHEMA_VERSION, read_table, write_table
from stabilitykit.records.provenance import Provenance
from stabilitykit.records.record import LogitsError, Record, StoredWeights, schema
from stabilitykit.words import counted, quoted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Kind = Literal["headroom", "heat", "exponents"]
"""What `plot` draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header(Provenance):
    """What has to be known to read the records, and to make them again.

    `tokens` holds the ids of every row of the last sequences that ran, with those in their cache; None when redacted.
    `token_texts` says what each id in it stands for. `starts` is the position at which each step's tokens begin,
    `lost_steps` are the steps whose outputs held an element that is not finite. `statistics` are those that a user
    added, by name, with their units: each has a column of its own, and is in every record's `extra`. `weights` is what
    storing the checkpoint in the run's dtype does to it, if that was looked at. `watched` are elements asked for: site,
    row-major index, value. `backward`: gradients were recorded too. `stopped`: the run ended at its first break,
    because it was asked to. `reference` is the dtype of the run that the records' deviations are from. `case` is
    free-form: prompt, rescale, rounding and whatever else was chosen; `loss_scale` is what the loss was multiplied by.
    """

    dtype: str
    device: str
    level: Level
    matmul: str
    formats: tuple[str, ...]
    statistics: Mapping[str, str] = field(default_factory=dict)
    rows: int
    tokens: tuple[tuple[int, ...], ...] | None
    token_texts: dict[int, str] = field(default_factory=dict)
    case: dict[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    watched: tuple[tuple[str, int, float], ...] = ()
    logits_error: LogitsError | None = None
    weights: StoredWeights | None = None
    starts: tuple[int, ...] = ()
    lost_steps: tuple[int, ...] = ()
    backward: bool = False
    stopped: bool = False
    reference: str | None = None
    error: str | None = None
    schema: int = SCHEMA_VERSION

    def text_of(self, token: int | None) -> str | None:
        """A token as text; None where that is not known, and for no token or a redacted one."""
        return None if token is None else self.token_texts.get(token)

    def named(self, token: int | None) -> str | None:
        """A token in a sentence: `'<bos>'`, or `(id 2)` where its text is not known; None as in `text_of`."""
        text = self.text_of(token)
        return quoted(text) if text else None if token is None else f"(id {token})"

    def first_position(self, step: int) -> int | None:
        """The absolute position of a step's first token; None for a step that is not known."""
        return self.starts[step] if 0 <= step < len(self.starts) else None


def _public(name: str) -> Any:
    """A name of the package, found when it is asked for: what explains and what draws is above this floor."""
    return getattr(import_module("stabilitykit"), name)


class Repro(Protocol):
    """What a recorder keeps beside the records, to write the operator that broke alone."""

    def write(self, recording: "Recording", folder: Path, *, redact: bool) -> Path: ...


class Recording:
    """A header and its records, in order of execution.

    `records` may be a function that makes them, which is called when they are first asked for. `repro` is what
    `export_repro` writes from; None where operands were not kept.
    """

    __slots__ = ("_records", "header", "repro")

    def __init__(
        self,
        header: Header,
        records: list[Record] | Callable[[], list[Record]] | None = None,
        *,
        repro: Repro | None = None,
    ) -> None:
        self.header = header
        self.repro = repro
        self._records = [] if records is None else records

    @property
    def records(self) -> list[Record]:
        if callable(self._records):
            self._records = self._records()
        return self._records

    @records.setter
    def records(self, records: list[Record] | Callable[[], list[Record]]) -> None:
        self._records = records

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def stopped(self) -> bool:
        """Whether the recorded block ended at its first break, as `record(..., stop_at_break=True)` asks."""
        return self.header.stopped

    def at(self, site: str, step: int = 0) -> Record:
        """The first record of `site` in `step`. Raises MisuseError, naming near ones, where there is none."""
        for record in self.records:
            if record.site == site and record.step == step:
                return record
        tail = site.rsplit(".", 1)[-1]
        near = sorted({record.site for record in self.records if record.site.endswith(tail)})[:5]
        raise MisuseError(f"no record of site {site!r} in step {step}; similar sites: {', '.join(near) or 'none'}")

    def first_break(self) -> Record | None:
        """The first record in order of execution whose `broke` is set, or None."""
        return next((record for record in self.records if record.broke is not None), None)

    @property
    def frame(self) -> "pd.DataFrame":
        """One row a record: the file's columns, and `stored` and `headroom`; docs/records.md has each with its unit.

        `frame[frame.stored]` are the tensors that 16 bits have to hold, without those that are computed in float32 on
        purpose, such as the squares in a norm: `frame[frame.stored].groupby("layer").amax.max()`. Gradients are none.
        """
        from stabilitykit.records.frame import frame  # pandas, a third of a second, only for those who look at one

        return frame(self.records, self.header.dtype, self.header.formats, tuple(self.header.statistics))

    def plot(self, kind: Kind = "headroom", **how: Any) -> "Axes":
        """One step drawn on matplotlib's axes, which are returned: as `stabilitykit.plot`, which says what `how` takes.

        `kind` is "headroom" (bits by layer), "heat" (bits by layer and site) or "exponents" (of one tensor).
        """
        drawn: Axes = _public("plot")(self, kind, **how)
        return drawn

    def __repr__(self) -> str:
        """`<Recording: gemma3-270m, float16, 1,342 tensors, 1 step>`"""
        header = self.header
        told = [header.checkpoint, header.dtype, counted(len(self), "tensor"), counted(len(header.starts), "step")]
        return f"<Recording: {', '.join(one for one in told if one)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: `repr`, and the verdict."""
        return f"<div><p><b>{escape(repr(self)[1:-1])}</b></p><p>{escape(_public('verdict')(self))}</p></div>"

    def save(self, path: str | Path) -> None:
        """Writes Parquet beside `path` and renames it. Raises MisuseError if `path` exists or cannot be written."""
        types = schema(self.header.formats, self.header.statistics)
        table = pa.Table.from_pylist([record.row() for record in self.records], schema=types)
        write_table(Path(path), table, dataclasses.asdict(self.header))

    def export_repro(self, folder: str | Path, *, redact: bool = False) -> Path:
        """Writes the operator that broke first, alone, into `folder`, new or empty: a bug report to be run.

        `operands.safetensors` holds the smallest operands found that still make the break, and `repro.py`, of at most
        60 lines, runs that one operator of torch's on them and prints what it gives; what it printed here is in its
        docstring. The break is the one that `verdict` is about: those before it, if any, end without loss. Where its
        damage was absorbed the operator that made finite numbers of it is run too. The script needs torch and
        safetensors alone. `redact` keeps all text out: prompts, tokens, names of modules, of files and of code.

        Returns the script's path. Raises MisuseError where there is nothing to write: nothing broke, operands were
        not kept (`record(..., keep_operands=True)` keeps them; a file holds none) or take too much memory, which
        operator it was is not known, or it does not break alone; and where the folder holds something already, or
        cannot be written.
        """
        if self.repro is None:
            raise MisuseError(
                "The operands of what broke were not kept: record(model, keep_operands=True) keeps them, for as long "
                "as the recording is in memory; a file has none."
            )
        return self.repro.write(self, Path(folder), redact=redact)

    @classmethod
    def load(cls, path: str | Path) -> "Recording":
        """Reads what `save` wrote. Raises MisuseError for a missing file or one that is no recording."""
        table, raw = read_table(Path(path))
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        return cls(from_document(Header, raw), Record.from_columns(columns))
