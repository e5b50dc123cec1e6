"""The sections of a report, in its order. To add one, write a file here and enter it below.

An experiment may bring sections of its own, as files beside it: see `own_section`.
"""

from collections.abc import Callable

from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Section
from stabilitykit.report.own_section import own_section
from stabilitykit.report.sections import (
    bounds,
    chain,
    error,
    explore,
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
    "explore": explore.section,
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
}
"""By the names that an experiment file knows them by."""

_FOUND_SINCE = ("search", "remedies", "bounds")
"""What commands of their own find out about a checkpoint."""

USUAL: tuple[str, ...] = tuple(name for name in SECTIONS if name not in _FOUND_SINCE)
"""What a report shows if the experiment does not say."""


def section(results: Results, name: str) -> Section:
    """The section of that name, or of the experiment's own file; raises MisuseError as `own_section` does."""
    if name in results.plan.own_sections:
        return own_section(results.plan, name)(results)
    return SECTIONS[name](results)


def shown(results: Results) -> list[str]:
    """The experiment's sections, or the usual ones; and what was found out about the checkpoint since."""
    names = list(results.plan.sections or USUAL)
    found = {"search": results.search, "remedies": results.ranking, "bounds": results.bounds}
    more = [name for name in _FOUND_SINCE if found[name] is not None and name not in names]
    end = names.index("provenance") if "provenance" in names else len(names)
    return names[:end] + more + names[end:]


__all__ = ["SECTIONS", "USUAL", "section", "shown"]
