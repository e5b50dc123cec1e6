"""What a guard tells Python's `logging`, with fields that a handler for JSON can take as they are."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from stabilitykit.guards.breaks import Did, RowBreak

LOGGER = logging.getLogger("stabilitykit.guard")

_DID: dict[str, Did] = {"stop": "stopped", "raise": "raised", "warn": "warned", "retry": "retried"}
_FIELDS = (
    "row phase step position token token_text seen absorbed harmless kind site label layer operator did why".split()
)


def tell(breaks: Sequence[RowBreak], how: str | None = None) -> list[RowBreak]:
    """Logs each break, with what was done about it as `how` says; a field `guard_...` for each of its own."""
    done = [one if how is None else replace(one, did=_DID[how]) for one in breaks]
    for one in done:
        fields = {f"guard_{name}": getattr(one, name) for name in _FIELDS}
        level = logging.WARNING if one.absorbed or one.did in ("warned", "retried") else logging.ERROR
        LOGGER.log(level, "%s: %s", one.did, one, extra={"guard_event": "break", **fields})
    return done


def tell_headroom(site: str, dtype: str, row: int, bits: float, limit: float) -> None:
    """Logs that little is left."""
    fields = {"guard_event": "headroom", "guard_site": site, "guard_row": row, "guard_headroom": bits}
    LOGGER.warning(
        "%.2f bits of headroom in %s at %s, row %d: under the limit of %g", bits, dtype, site, row, limit, extra=fields
    )


def told(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def tell_failure(what: str, error: Exception) -> None:
    """Logs that the guard itself failed at something; the model's pass goes on."""
    fields = {"guard_event": "failure", "guard_what": what}
    LOGGER.error("the guard failed at %s (%s); the model's pass goes on", what, told(error), extra=fields)
