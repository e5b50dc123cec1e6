"""Dataclasses as JSON documents and back, by the types of their fields."""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stabilitykit.errors import MisuseError
from stabilitykit.files import write_json

_T = TypeVar("_T")
_NOT_FINITE = ("nan", "inf", "-inf")


def to_document(value: Any) -> Any:
    """`value` as JSON values: dataclasses and mappings become objects, tuples become arrays.

    Properties that a dataclass names in `derived` are written too, for other readers of the file, and ignored when it
    is read. NaN and infinities, which JSON cannot represent, become the strings "nan", "inf" and "-inf".
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [*(field.name for field in dataclasses.fields(value)), *_derived(type(value))]
        return {name: to_document(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): to_document(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [to_document(held) for held in value]
    return finite_or_text(value) if isinstance(value, float) else value


def from_document(kind: type[_T], raw: Any) -> _T:
    """The inverse of `to_document` for a dataclass of type `kind`.

    Fields that are not in `raw` get their defaults. Raises TypeError or ValueError for any other document: one that
    lacks a field without a default, has a field that the dataclass does not, or a value of another type.
    """
    value: _T = _read(kind, raw)
    return value


def write_document(path: Path, value: Any) -> None:
    """Writes a dataclass with a field `schema`; raises as `write_json`."""
    write_json(path, to_document(value))


def read_document(path: Path, kind: type[_T], what: str) -> _T:
    """Reads what `write_document` wrote. `what` names it in messages, such as "a search".

    Raises MisuseError for a file that cannot be read as one, or has another schema version.
    """
    (version,) = (field.default for field in dataclasses.fields(kind) if field.name == "schema")  # type: ignore[arg-type]
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise MisuseError(f"{path} cannot be read as {what}: it holds no JSON object.")
        if raw["schema"] != version:
            raise MisuseError(f"{path} has schema {raw['schema']}, but this version reads schema {version}.")
        return from_document(kind, raw)
    except MisuseError:
        raise
    except OSError as error:
        raise MisuseError(f"{path} cannot be read as {what}: {error.strerror or error}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MisuseError(f"{path} cannot be read as {what}, because it is not JSON: {error}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MisuseError(f"{path} cannot be read as {what}: {error!r}.") from None


def finite_or_text(number: float | None) -> float | str | None:
    """A number as JSON allows it: NaN and infinities become the strings "nan", "inf" and "-inf"."""
    return number if number is None or math.isfinite(number) else str(number)


def _read(hint: Any, raw: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if raw is None and NoneType in arguments:
            return None
        return _read(next(argument for argument in arguments if argument is not NoneType), raw)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(raw, Mapping):
            raise TypeError(f"{hint.__name__} must be an object, got {raw!r}")
        hints = _hints(hint)
        kept = {name: held for name, held in raw.items() if name not in _derived(hint)}
        return hint(**{name: _read(hints[name], held) if name in hints else held for name, held in kept.items()})
    if origin is tuple:
        if not isinstance(raw, list | tuple):
            raise TypeError(f"expected a list, got {raw!r}")
        if Ellipsis in arguments:
            return tuple(_read(arguments[0], held) for held in raw)
        return tuple(_read(argument, held) for argument, held in zip(arguments, raw, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(raw, Mapping):
            raise TypeError(f"expected an object, got {raw!r}")
        key, held = arguments
        return {key(name): _read(held, value) for name, value in raw.items()}
    if origin is Literal and raw not in arguments:
        raise ValueError(f"expected one of {arguments}, got {raw!r}")
    if origin is Literal or hint is Any:
        return raw
    if hint is float and raw in _NOT_FINITE:
        return float(raw)
    if not isinstance(raw, (int, float) if hint is float else hint) or (isinstance(raw, bool) and hint is not bool):
        raise TypeError(f"expected {hint.__name__}, got {raw!r}")
    return raw


def _derived(kind: type) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(kind, "derived", ())
    return names


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
