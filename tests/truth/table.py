"""Every planted fault and every control, in one list."""

from collections import Counter

from truth import controls, decoders
from truth.row import Row

TABLE: tuple[Row, ...] = (*decoders.ROWS,)
CONTROLS: tuple[Row, ...] = controls.ROWS

_keys = Counter(row.key for row in (*TABLE, *CONTROLS))
assert max(_keys.values()) == 1, [key for key, count in _keys.items() if count > 1]
