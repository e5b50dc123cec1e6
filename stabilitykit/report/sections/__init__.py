"""The sections of a report, in its order. To add one, write a file here and enter it below."""

from collections.abc import Callable

from stabilitykit.report.blocks import Section
from stabilitykit.report.sections import (
    chain,
    error,
    exponents,
    heat,
    lengths,
    memory,
    peaks,
    provenance,
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
    "softmax": softmax.section,
    "error": error.section,
    "memory": memory.section,
    "provenance": provenance.section,
}

__all__ = ["SECTIONS"]
