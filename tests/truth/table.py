"""Every planted fault and every control, in one list."""

from collections import Counter

from truth import (
    backward,
    controls,
    decoders,
    decoding,
    experts,
    others,
    plain_ends,
    plain_formats,
    plain_masks,
    plain_origins,
    plain_outside,
    plain_places,
    plain_rest,
    wrapping,
)
from truth.row import Row

_ALL: tuple[Row, ...] = (
    *decoders.ROWS,
    *decoding.ROWS,
    *wrapping.ROWS,
    *experts.ROWS,
    *others.ROWS,
    *plain_origins.ROWS,
    *plain_masks.ROWS,
    *plain_ends.ROWS,
    *plain_formats.ROWS,
    *plain_places.ROWS,
    *plain_outside.ROWS,
    *plain_rest.ROWS,
    *backward.ROWS,
    *controls.ROWS,
)
CONTROLS = tuple(row for row in _ALL if row.name.startswith("control"))
TABLE = tuple(row for row in _ALL if not row.name.startswith("control"))

_keys = Counter(row.key for row in _ALL)
assert max(_keys.values()) == 1, [key for key, count in _keys.items() if count > 1]

ROWS = (*TABLE, *CONTROLS)
