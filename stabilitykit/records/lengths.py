"""What happens to one text at every length, from as few forward passes as possible; Parquet, without torch.

In a causal model the values at a position do not depend on later tokens. So the running maximum of a tensor's peaks
over positions is its amax at every shorter length, and the first break of the longest run is that of every length that
includes the broken position. Shorter lengths need their own run, because a lost position spreads: 0 · NaN = NaN, masked
or not.
"""

import bisect
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stabilitykit.records.document import from_document
from stabilitykit.records.parquet import read_table, write_table
from stabilitykit.records.record import Break
from stabilitykit.records.recording import Header, Recording


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive lengths, `first` to `last` tokens, at which the same element breaks first, or none does.

    `run` is the length of the forward pass that shows it. Where `direct`, that pass had this very length. Where
    `near`, a value is so close to the format's maximum that kernels of another shape might round it to the other
    side: such a span reports what the pass saw, and is certain only where it is `direct`.
    """

    first: int
    last: int
    run: int
    site: str | None = None
    label: str | None = None
    layer: int | None = None
    operator: str | None = None
    order: int | None = None
    token_text: str | None = None
    broke: Break | None = None
    direct: bool = False
    near: bool = False

    @classmethod
    def of(cls, recording: Recording, *, first: int, last: int, run: int, direct: bool = False) -> "Span":
        """With the recording's first break, if it has one."""
        record = recording.first_break()
        if record is None or record.broke is None:
            return cls(first=first, last=last, run=run, direct=direct)
        return cls(
            first=first,
            last=last,
            run=run,
            site=record.site,
            label=record.label,
            layer=record.layer,
            operator=record.operator,
            order=record.order,
            token_text=recording.header.text_of(record.broke.token),
            broke=record.broke,
            direct=direct,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """A position at which the running maximum of a site's magnitudes grows: from `position` on its amax is `amax`."""

    run: int
    order: int
    site: str
    label: str | None
    layer: int | None
    position: int
    amax: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A length that was run again directly, and how its peaks compare with those taken from the longer run.

    `site` and `direct_site` are the first breaks in the longer and in the direct run, None for none. Differences are in
    units in the last place of the dtype, at the larger of the two. `peak_ulp` is that of the largest peak of all sites,
    `ulp` the largest of any site's, at `ulp_site`, over `compared` sites, of which `beyond` differ by more than four;
    `relative` is the largest relative difference. `agrees`: the same site, and the largest peak within four ulp. Single
    sites may differ more, because kernels of another shape sum in another order and later layers amplify that.
    """

    length: int
    site: str | None
    direct_site: str | None
    ulp: float
    ulp_site: str | None
    relative: float
    compared: int
    agrees: bool
    peak_ulp: float
    beyond: int


@dataclass(slots=True)
class LengthMap:
    """Every length from 1 to the last span's, of one text in one dtype; spans ascend without gaps.

    Peaks are of the tensors stored in the run's dtype, as in `diagnosis.stored`.
    """

    header: Header
    spans: tuple[Span, ...]
    peaks: tuple[Peak, ...]
    checks: tuple[Check, ...] = ()
    _steps: dict[tuple[int, str], tuple[list[int], list[float]]] = field(default_factory=dict, repr=False)
    _curve: npt.NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def longest(self) -> int:
        return self.spans[-1].last

    @property
    def first_broken(self) -> int | None:
        """The shortest length that breaks; None where none does."""
        return next((span.first for span in self.spans if span.broke is not None), None)

    def span(self, length: int) -> Span:
        """The span that includes `length`. Raises ValueError outside 1 to `longest`."""
        at = bisect.bisect_right([span.first for span in self.spans], length) - 1
        if not 1 <= length <= self.longest:
            raise ValueError(f"length must be from 1 to {self.longest}, got {length}")
        return self.spans[at]

    def sites(self, length: int) -> list[str]:
        """The sites whose amax at `length` is known, in order of execution: those before the first break."""
        span = self.span(length)
        return [site for site, order in self._orders[span.run] if span.order is None or order < span.order]

    def amax(self, site: str, length: int) -> float | None:
        """The largest finite magnitude at `site` in a run of `length` tokens; None where it is not known."""
        run = self.span(length).run
        if not self._steps:
            for peak in self.peaks:
                positions, values = self._steps.setdefault((peak.run, peak.site), ([], []))
                positions.append(peak.position)
                values.append(peak.amax)
        positions, values = self._steps.get((run, site), ([], []))
        at = bisect.bisect_right(positions, length - 1) - 1
        return values[at] if at >= 0 else None

    def peak(self, length: int) -> tuple[str, float] | None:
        """The site with the largest amax at `length`, among those that are known, and that amax."""
        found = [(self.amax(site, length), site) for site in self.sites(length)]
        known = [(amax, site) for amax, site in found if amax is not None]
        if not known:
            return None
        amax, site = max(known, key=lambda pair: pair[0])
        return site, amax

    def curve(self) -> npt.NDArray[np.float64]:
        """The amax of `peak` at every length, as an array over lengths 1 to `longest`; NaN where none is known.

        The array is cached and read-only.
        """
        if self._curve is None:
            self._curve = self._find_curve()
            self._curve.flags.writeable = False
        return self._curve

    def _find_curve(self) -> npt.NDArray[np.float64]:
        found = np.full(self.longest, np.nan)
        for span in self.spans:
            peaks = [p for p in self.peaks if p.run == span.run and (span.order is None or p.order < span.order)]
            highest = np.full(span.last, -np.inf)
            within = [(p.position, p.amax) for p in peaks if p.position < span.last]
            if within:
                positions, values = zip(*within, strict=True)
                np.maximum.at(highest, np.array(positions), np.array(values))
            highest = np.maximum.accumulate(highest)[span.first - 1 :]
            found[span.first - 1 : span.last] = np.where(np.isneginf(highest), np.nan, highest)
        return found

    @property
    def runs(self) -> int:
        """How many forward passes the spans come from; those that only check them are not counted."""
        return len({span.run for span in self.spans})

    @property
    def _orders(self) -> dict[int, list[tuple[str, int]]]:
        runs: dict[int, dict[str, int]] = {}
        for peak in self.peaks:
            runs.setdefault(peak.run, {}).setdefault(peak.site, peak.order)
        return {run: sorted(sites.items(), key=lambda pair: pair[1]) for run, sites in runs.items()}

    def save(self, path: Path) -> None:
        """As `Recording.save`."""
        rows = [dataclasses.asdict(peak) for peak in self.peaks]
        header = dataclasses.asdict(self.header) | {
            "spans": [dataclasses.asdict(span) for span in self.spans],
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }
        write_table(path, pa.Table.from_pylist(rows, schema=_SCHEMA), header)

    @classmethod
    def load(cls, path: Path) -> "LengthMap":
        """As `Recording.load`."""
        table, raw = read_table(path)
        spans = from_document(tuple[Span, ...], raw.pop("spans"))
        checks = from_document(tuple[Check, ...], raw.pop("checks"))
        columns = (table.column(spec.name).to_pylist() for spec in dataclasses.fields(Peak))
        peaks = tuple(
            Peak(run=run, order=order, site=site, label=label, layer=layer, position=position, amax=amax)
            for run, order, site, label, layer, position, amax in zip(*columns, strict=True)
        )
        return cls(from_document(Header, raw), spans, peaks, checks)


_SCHEMA = pa.schema(
    {
        "run": pa.int64(),
        "order": pa.int64(),
        "site": pa.string(),
        "label": pa.string(),
        "layer": pa.int64(),
        "position": pa.int64(),
        "amax": pa.float64(),
    }
)
