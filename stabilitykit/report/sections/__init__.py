"""The sections of a report, in its order. To add one, write a file here and enter it below."""

from collections.abc import Callable

from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Section
from stabilitykit.report.sections import (
    bounds,
    chain,
    claims,
    error,
    exponents,
    forecast,
    heat,
    lengths,
    memory,
    peaks,
    provenance,
    remedies,
    search,
    softmax,
    verdict,
)

SECTIONS: dict[str, Callable[[Results], Section]] = {
    "verdict": verdict.section,
    "lengths": lengths.section,
    "chain": chain.section,
    "peaks": peaks.section,
    "heat": heat.section,
    "exponents": exponents.section,
    "forecast": forecast.section,
    "softmax": softmax.section,
    "error": error.section,
    "memory": memory.section,
    "search": search.section,
    "remedies": remedies.section,
    "bounds": bounds.section,
    "provenance": provenance.section,
    "claims": claims.section,
}
"""By the names that an experiment file knows them by."""

_FOUND_SINCE = ("search", "remedies", "bounds")
"""What commands of their own find out about a checkpoint."""

USUAL: tuple[str, ...] = tuple(name for name in SECTIONS if name not in ("claims", *_FOUND_SINCE))
"""What a report shows if the experiment does not say."""


def shown(results: Results) -> list[str]:
    """The experiment's sections, or the usual ones; and what was found out about the checkpoint since."""
    names = list(results.plan.sections or USUAL)
    found = {"search": results.search, "remedies": results.ranking, "bounds": results.bounds}
    more = [name for name in _FOUND_SINCE if found[name] is not None and name not in names]
    end = names.index("provenance") if "provenance" in names else len(names)
    return names[:end] + more + names[end:]


__all__ = ["SECTIONS", "USUAL", "shown"]
