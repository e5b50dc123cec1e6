"""Dataclasses as JSON: what is written is read back, whatever the type, and what is damaged is refused."""

import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from bounded import SITES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stabilitykit.records
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS
from stabilitykit.records.bounds import Bounds, SiteBound
from stabilitykit.records.document import from_document, read_document, to_document, write_document
from stabilitykit.records.lengths import LengthMap
from stabilitykit.records.search import Search
from stabilitykit.records.sweep import Memory, Results

HELD: dict[str, type] = {
    name: kind
    for module in pkgutil.iter_modules(stabilitykit.records.__path__)
    for name, kind in vars(importlib.import_module(f"stabilitykit.records.{module.name}")).items()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in (LengthMap, Results)
}
"""Every dataclass of `records` but two that are more than what they hold: a new one is tested once it is there."""

FILES = {name: kind for name, kind in HELD.items() if "schema" in {spec.name for spec in dataclasses.fields(kind)}}
"""Those that `read_document` reads."""


def values(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Values of a field's type, NaN, infinities, None and empty tuples among them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if name == "dtype":
        return st.sampled_from(sorted(FORMATS))  # derived properties look it up
    if name == "schema":
        return st.nothing()
    if origin in (Union, UnionType):
        return st.one_of(*(values(argument) for argument in arguments))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return documents(hint)
    if origin is tuple and Ellipsis in arguments:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if origin is Literal:
        return st.sampled_from(arguments)
    plain = {bool: st.booleans(), int: st.integers(), float: st.floats(), str: st.text(max_size=4), NoneType: st.none()}
    return plain[hint] if hint in plain else st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4))


def documents(kind: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    names = [spec.name for spec in dataclasses.fields(kind) if spec.name != "schema"]
    return st.builds(kind, **{name: values(hints[name], name) for name in names})


@pytest.mark.parametrize("name", HELD)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(name: str, data: st.DataObject) -> None:
    value = data.draw(documents(HELD[name]))
    text = json.dumps(to_document(value), allow_nan=False)  # strictly JSON: no NaN in it
    assert repr(from_document(HELD[name], json.loads(text))) == repr(value)  # unlike ==, for which NaN is not NaN


def test_the_types_are_found() -> None:
    assert {"Bounds", "Search", "Ranking", "Plan", "Header", "Span", "Memory", "Shortage", "Failure"} <= HELD.keys()
    found = {"Bounds", "Search", "Ranking", "Plan", "Header", "Diagnosis", "TrainingDiagnosis", "Gate", "Baseline"}
    assert FILES.keys() == found


@dataclasses.dataclass(frozen=True)
class Everything:
    """A field of each form."""

    derived: ClassVar[tuple[str, ...]] = ("double",)

    numbers: tuple[float, ...]
    whole: int
    keyed: Mapping[int, tuple[str, float]]
    choice: Literal["a", "b"]
    flag: bool = True
    absent: float | None = None
    empty: tuple[int, ...] = ()
    schema: int = 3

    @property
    def double(self) -> int:
        return 2 * self.whole


EVERYTHING = Everything(numbers=(1.5, math.inf, -math.inf, math.nan), whole=4, keyed={7: ("x", 0.0)}, choice="a")
DOCUMENT: dict[str, Any] = {
    "numbers": [1.5, "inf", "-inf", "nan"], "whole": 4, "keyed": {"7": ["x", 0.0]}, "choice": "a", "flag": True,
    "absent": None, "empty": [], "schema": 3, "double": 8,
}  # fmt: skip


def test_each_form_of_field_has_its_form_in_json() -> None:
    assert to_document(EVERYTHING) == DOCUMENT
    assert repr(from_document(Everything, DOCUMENT)) == repr(EVERYTHING)
    short = {name: DOCUMENT[name] for name in ("numbers", "whole", "keyed", "choice")}
    assert repr(from_document(Everything, short)) == repr(EVERYTHING)  # what is left out has its default


def test_derived_properties_are_written_and_not_read() -> None:
    (site,) = (one for one in SITES if one.site == "layers.1")
    raw = to_document(site)
    assert (raw["limit"], raw["verdict"]) == (65_504.0, "reachable by a prompt")
    assert from_document(SiteBound, raw | {"limit": 1.0, "verdict": "open"}) == site


@pytest.mark.parametrize(
    "damage",
    [
        {"whole": 1.5}, {"whole": "4"}, {"whole": True}, {"whole": None}, {"numbers": 1.5}, {"numbers": ["1.5"]},
        {"numbers": [True]}, {"numbers": [None]}, {"keyed": [7]}, {"keyed": {"seven": ["x", 0.0]}},
        {"keyed": {"7": ["x"]}}, {"keyed": {"7": ["x", 0.0, 0.0]}}, {"choice": "c"}, {"choice": []}, {"flag": 1},
        {"absent": "none"}, {"empty": "12"}, {"another": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(DOCUMENT | damage))
    with pytest.raises(MisuseError, match=r"file\.json cannot be read as everything: (Type|Value)Error"):
        read_document(path, Everything, "everything")


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_damage_to_a_file_is_refused_in_a_sentence(name: str, data: st.DataObject, tmp_path: Path) -> None:
    kind, path = FILES[name], tmp_path / "file.json"
    value = data.draw(documents(kind))
    write_document(path, value)
    assert repr(read_document(path, kind, "a file")) == repr(value)
    raw = json.loads(path.read_text())

    def refused(damaged: object, message: str) -> None:
        path.write_text(json.dumps(damaged))
        with pytest.raises(MisuseError, match=message):
            read_document(path, kind, "a file")

    for spec in dataclasses.fields(kind):
        if spec.default is spec.default_factory is dataclasses.MISSING:
            refused({key: held for key, held in raw.items() if key != spec.name}, f"missing .*'{spec.name}'")
        if spec.name != "schema":
            wrong = [] if isinstance(raw[spec.name], dict) else {"an": "object"}
            refused(raw | {spec.name: wrong}, "cannot be read as a file: ")
    refused(raw | {"another": 1}, "unexpected keyword argument 'another'")
    version = raw["schema"]
    refused(raw | {"schema": version + 1}, f"has schema {version + 1}, but this version reads schema {version}")
    refused({key: held for key, held in raw.items() if key != "schema"}, "cannot be read as a file: KeyError")
    others: tuple[object, ...] = ([], "text", 1, None)
    for other in others:
        refused(other, "cannot be read as a file: it holds no JSON object")


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    for path, content in ((tmp_path / "missing.json", None), (tmp_path / "cut.json", b"{"), (tmp_path / "b", b"\xff")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(
            MisuseError, match=rf"{path.name} cannot be read as a search(: No such|, because it is not JSON: )"
        ):
            read_document(path, Search, "a search")
    with pytest.raises(MisuseError, match="cannot be read as bounds"):
        read_document(tmp_path, Bounds, "bounds")


def test_a_computed_property_that_is_not_derived_is_not_written() -> None:
    made = Memory(dtype="float16", length=8, device="cpu", weights=1, cache=2, activations=3, libraries=4, peak=20)
    assert to_document(made).keys() == {spec.name for spec in dataclasses.fields(Memory)}
    assert made.error == pytest.approx((6 - 16) / 16)
