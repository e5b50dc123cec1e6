"""A user's own statistics, added to every record: `record(model, statistics=[...])`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.recorder.blocks import Part
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.pending import Pending, Row
from stabilitykit.recorder.tensors import aside, is_here
from stabilitykit.records import Record
from stabilitykit.words import counted


@dataclass(frozen=True, slots=True)
class Statistic:
    """A user's own statistic: one number per recorded tensor.

        near_zero = Statistic("near_zero", "fraction of elements", lambda x: (x.abs() < 1e-6).float().mean())

    `name` is the column in `Recording.frame` and in the file; `unit` is kept in the header and shown in tables.

    `function` is called once per recorded tensor, of any shape and strides, on the model's device: float16, bfloat16,
    float32 or float64 (float8 arrives as float32, complex numbers as pairs). Elements hidden by a mask are NaN, so
    `nanmean` and `nansum` skip them; other non-finite elements are unchanged. It returns one number, preferably a 0-d
    tensor, which stays on the device until the pass has ended; `item()` would synchronise. It must not write to the
    tensor or draw random numbers. It is not called on the meta device.

    An exception in `function` does not reach the model: the record has None, a warning is issued at the end of the
    block, and the header's notes say so.

    Attention over a long prompt is computed in blocks of queries. Tensors computed in blocks have a value only with
    `join`, which combines the numbers of two blocks, such as `max`; otherwise they have None.
    """

    name: str
    unit: str
    function: Callable[[Tensor], Tensor | float]
    join: Callable[[float, float], float] | None = None


class CustomStatistics:
    """Evaluates a user's statistics, and remembers which of them failed."""

    def __init__(self, statistics: Sequence[Statistic], pending: Pending) -> None:
        """Raises MisuseError for a name that is not a valid, unused column name."""
        names = [statistic.name for statistic in statistics]
        taken = {spec.name for spec in dataclasses.fields(Record)}
        for name in names:
            if not name.isidentifier():
                raise MisuseError(f"A statistic's name must be an identifier, such as 'near_zero'; got {name!r}.")
            if name in taken:
                raise MisuseError(f"Records already have a column {name!r}; give the statistic another name.")
            if names.count(name) > 1:
                raise MisuseError(f"Two statistics are named {name!r}; give each its own name.")
        self.units = {statistic.name: statistic.unit for statistic in statistics}
        self._statistics = tuple(statistics)
        self._pending = pending
        self._failed: dict[str, tuple[set[int], str]] = {}  # by name, of which entries, and how first

    def __bool__(self) -> bool:
        return bool(self._statistics)

    def take(self, entry: Entry, values: Tensor, hidden: Tensor | None, part: Part | None) -> None:
        """The user's numbers of a tensor, or of one more part of it, which go into its record."""
        with aside():
            if hidden is not None:
                values = values.masked_fill(hidden, torch.nan)
            for statistic in self._statistics:
                entry.extra.setdefault(statistic.name, None)
                if not values.is_meta and (part is None or statistic.join is not None):
                    self._call(statistic, entry, values)

    def failures(self) -> list[str]:
        """A sentence about each statistic that failed."""
        return [
            f"The statistic {name!r} is missing for {counted(len(entries), 'tensor')}: its function raised {how}"
            for name, (entries, how) in self._failed.items()
        ]

    def _call(self, statistic: Statistic, entry: Entry, values: Tensor) -> None:
        try:
            found = statistic.function(values)
            if not isinstance(found, Tensor):
                self._keep(statistic, entry, float(found))
            elif found.numel() != 1:
                raise ValueError(f"a tensor of shape {list(found.shape)} instead of one number")
            elif is_here(found):
                self._keep(statistic, entry, float(found))
            else:
                dtype = torch.float32 if found.device.type == "mps" else torch.float64
                number = found.detach().reshape(1).to(dtype)

                def keep(row: Row) -> None:
                    self._keep(statistic, entry, float(row[0]))

                self._pending.after(number, keep, ())
        except Exception as error:  # of the user's own code, which must not end their forward pass
            self._fail(statistic, entry, error)

    def _keep(self, statistic: Statistic, entry: Entry, number: float) -> None:
        name = statistic.name
        if name in self._failed and id(entry) in self._failed[name][0]:
            return  # of another part of this tensor it is missing
        before = entry.extra[name]
        if before is not None and statistic.join is not None:
            try:
                number = float(statistic.join(before, number))
            except Exception as error:
                self._fail(statistic, entry, error)
                return
        entry.extra[name] = number

    def _fail(self, statistic: Statistic, entry: Entry, error: Exception) -> None:
        how = f"{type(error).__name__} at {entry.site}: {error}"
        self._failed.setdefault(statistic.name, (set(), how))[0].add(id(entry))
        entry.extra[statistic.name] = None
