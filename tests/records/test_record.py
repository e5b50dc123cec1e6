"""A recording survives its file, and its file survives accidents."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from stabilitykit.errors import MisuseError
from stabilitykit.recorder import record
from stabilitykit.records import Recording, flat_index, index_at
from stabilitykit.records.document import finite_or_text
from stabilitykit.records.parquet import SCHEMA_VERSION
from stabilitykit.words import printable, quoted


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * 4, -1)


@pytest.fixture
def recording() -> Recording:
    model = Breaks()
    with torch.no_grad(), record(model, position_peaks=True, watch=[("/mul.0", 1)], case={"why": "a test"}) as seen:
        model(torch.tensor([[[1.0, 40000.0], [-2.0, 0.0]]], dtype=torch.float16))
    return seen


def test_a_recording_is_read_as_it_was_written(recording: Recording, tmp_path: Path) -> None:
    assert recording.first_break() is not None
    assert recording.records[1].softmax is not None
    recording.save(tmp_path / "run.parquet")
    read = Recording.load(tmp_path / "run.parquet")
    assert read.header == recording.header
    assert repr(read.records) == repr(recording.records)  # NaN entropies are equal by their text only


def test_a_path_may_be_a_text(recording: Recording, tmp_path: Path) -> None:
    recording.save(str(tmp_path / "new" / "run.parquet"))
    assert Recording.load(str(tmp_path / "new" / "run.parquet")).header == recording.header
    with pytest.raises(MisuseError, match="cannot be read as a recording"):
        Recording.load(str(tmp_path / "nowhere.parquet"))


def test_the_frame_has_the_files_columns(recording: Recording, tmp_path: Path) -> None:
    recording.save(tmp_path / "run.parquet")
    computed = {"stored", "headroom"}
    in_file = [name for name in recording.frame.columns if name not in computed]
    assert in_file == pq.read_schema(tmp_path / "run.parquet").names
    assert recording.frame.loc[0, "float16.overflow"] == 0
    assert recording.frame.loc[0, "broke.kind"] == "overflow"


def test_an_empty_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Nothing was recorded"), record(Breaks()) as nothing:
        pass
    nothing.save(tmp_path / "empty.parquet")
    read = Recording.load(tmp_path / "empty.parquet")
    assert (len(read), read.first_break()) == (0, None)
    assert list(read.frame.columns) == list(nothing.frame.columns)


def test_nothing_is_overwritten_and_nothing_is_left_beside(recording: Recording, tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    path.write_text("mine")
    with pytest.raises(MisuseError, match="never overwrites"):
        recording.save(path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused_in_a_sentence(recording: Recording, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="cannot be read as a recording"):
        Recording.load(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(MisuseError, match="cannot be read as a recording"):
        Recording.load(tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(MisuseError, match="not a recording of stabilitykit"):
        Recording.load(tmp_path / "other.parquet")
    header = {"schema": SCHEMA_VERSION + 1, "versions": {"stabilitykit": "9.9"}}
    table = pa.table({"a": [1]}).replace_schema_metadata({b"stabilitykit": json.dumps(header).encode()})
    pq.write_table(table, tmp_path / "newer.parquet")
    with pytest.raises(MisuseError, match=r"read it with stabilitykit 9\.9"):
        Recording.load(tmp_path / "newer.parquet")


def test_a_site_that_was_not_recorded_is_told_its_neighbours(recording: Recording) -> None:
    with pytest.raises(MisuseError, match=r"no record of site 'layers\.3/mul\.0' in step 0; similar sites: /mul\.0"):
        recording.at("layers.3/mul.0")


def test_row_major_indices() -> None:
    shape = (2, 3, 4)
    assert [flat_index(index_at(i, shape), shape) for i in range(24)] == list(range(24))
    assert index_at(23, shape) == (1, 2, 3)
    assert (index_at(0, ()), flat_index((), ())) == ((), 0)


def test_numbers_that_json_cannot_hold_become_text() -> None:
    numbers = (1.5, None, float("inf"), -float("inf"), float("nan"))
    assert [finite_or_text(number) for number in numbers] == [1.5, None, "inf", "-inf", "nan"]


def test_a_piece_stands_between_quotes_it_does_not_hold() -> None:
    pieces = (" a", "\\n", "\n\x1b", "it's", '"', """'\"""")
    assert [quoted(piece) for piece in pieces] == ["' a'", "'\\n'", "'\\n\\x1b'", '"it\'s"', "'\"'", "''\"'"]


def test_a_piece_tells_a_line_end_from_a_backslash_and_an_n() -> None:
    texts = ("\n", "\\n", "\\", "é\u200b")
    assert [printable(text) for text in texts] == ["\\n", "\\\\n", "\\\\", "é\\u200b"]
    assert [quoted(printable(text)) for text in texts[:2]] == ["'\\n'", "'\\\\n'"]
