"""The table: every entry by its name."""

from scaled.cases import CASES
from scaled.decoders import DECODERS
from scaled.others import OTHER

ENTRIES = {entry.name: entry for entry in (*DECODERS, *OTHER, *CASES)}
