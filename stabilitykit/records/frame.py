"""A recording as a pandas frame: a row a record, the file's columns and two more, of dtypes that no run changes."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pandas as pd

from stabilitykit.records.record import NESTED, FormatCounts, Record

_PLAIN = {int: ("int64", "Int64"), bool: ("bool", "boolean"), float: ("float64", "float64"), str: ("string", "string")}


def frame(records: list[Record], dtype: str, formats: tuple[str, ...], statistics: tuple[str, ...]) -> pd.DataFrame:
    """One row a record, of a run in `dtype`.

    Whole numbers and truths that may be missing are pandas' nullable ones (`<NA>`), numbers NaN; lists are tuples, None
    where there is none. `stored` and `headroom` are computed; all else is in the file.
    """
    rows = [record.row() | {"stored": record.is_stored_in(dtype), "headroom": record.headroom} for record in records]
    return pd.DataFrame(
        {name: pd.Series([row.get(name) for row in rows], dtype=kind) for name, kind in columns(formats, statistics)}
    )


def columns(formats: tuple[str, ...], statistics: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Each column and its pandas dtype, in order."""
    hints = get_type_hints(Record)
    for spec in dataclasses.fields(Record):
        if spec.name == "formats":
            for form in formats:
                yield from ((f"{form}.{inner.name}", "Int64") for inner in dataclasses.fields(FormatCounts))
        elif spec.name == "extra":
            yield from ((name, "float64") for name in statistics)
        elif spec.name in NESTED:
            inner_hints = get_type_hints(NESTED[spec.name])
            for name in inner_hints:
                yield f"{spec.name}.{name}", _dtype(inner_hints[name], optional=True)
        else:
            yield spec.name, _dtype(hints[spec.name])
        if spec.name == "stored_dtype":
            yield "stored", "bool"
        elif spec.name == "amax":
            yield "headroom", "float64"


def _dtype(hint: Any, *, optional: bool = False) -> Any:
    arguments = [argument for argument in get_args(hint) if argument is not type(None)]
    if hint in _PLAIN:
        return _PLAIN[hint][optional]
    if Ellipsis in arguments:
        return "object"
    return "string" if isinstance(arguments[0], str) else _dtype(arguments[0], optional=True)
