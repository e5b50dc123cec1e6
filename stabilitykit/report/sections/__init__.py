"""The sections of a report, in its order. To add one, write a file here and enter it below."""

from collections.abc import Callable

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
from stabilitykit.results import Results

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

USUAL: tuple[str, ...] = tuple(name for name in SECTIONS if name != "claims")
"""What a report shows if the experiment does not say."""


def shown(results: Results) -> list[str]:
    """The experiment's sections, or the usual ones; and what was found out about the checkpoint since."""
    names = list(results.plan.sections or USUAL)
    added = {"search": results.search, "remedies": results.ranking, "bounds": results.bounds}
    return names + [name for name, found in added.items() if found is not None and name not in names]


__all__ = ["SECTIONS", "USUAL", "shown"]
