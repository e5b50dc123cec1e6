"""Parquet files with a header: a table, and JSON under the schema's metadata key `stabilitykit`."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stabilitykit.errors import MisuseError
from stabilitykit.files import cannot_write, written_beside

SCHEMA_VERSION = 2
_HEADER_KEY = b"stabilitykit"


def write_table(path: Path, table: pa.Table, header: dict[str, Any]) -> None:
    """Writes the table with `header`; the file is written completely or not at all.

    Raises MisuseError if `path` exists or cannot be written.
    """
    if path.exists():
        raise MisuseError(f"{path} already exists, and a recording never overwrites a file; choose another name.")
    table = table.replace_schema_metadata({_HEADER_KEY: json.dumps(header, ensure_ascii=False).encode()})
    try:
        with written_beside(path) as aside:
            pq.write_table(table, aside)
    except OSError as error:
        raise cannot_write(path, error) from None


def read_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the header that `write_table` wrote.

    Raises MisuseError for a missing file, one without such a header, or one with another schema version.
    """
    try:
        with pq.ParquetFile(path) as file:  # pq.read_table is for data sets, and imports pandas
            table = file.read()
    except (OSError, pa.ArrowInvalid) as error:
        raise MisuseError(f"{path} cannot be read as a recording, which is a Parquet file: {error}") from None
    text = (table.schema.metadata or {}).get(_HEADER_KEY)
    if text is None:
        raise MisuseError(f"{path} is a Parquet file, but not a recording of stabilitykit: it has no header.")
    raw: dict[str, Any] = json.loads(text)
    if raw["schema"] != SCHEMA_VERSION:
        raise MisuseError(
            f"{path} has schema {raw['schema']}, but this version reads schema {SCHEMA_VERSION}; "
            f"read it with stabilitykit {raw['versions'].get('stabilitykit', 'of its time')}."
        )
    return table, raw
