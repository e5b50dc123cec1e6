"""A check as a JUnit report: a case for the weights, and one for each prompt and limit."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from stabilitykit.files import write_text
from stabilitykit.records.gate import Gate, LimitName, Violation
from stabilitykit.words import escaped

_SUITE = "stabilitykit check"


def write_junit(path: Path, gate: Gate) -> None:
    """Replaces an existing file. Raises MisuseError where it cannot be written."""
    write_text(path, junit(gate))


def junit(gate: Gate) -> str:
    """The report, in the form that Jenkins, GitLab and GitHub's actions read; every case takes no time."""
    root = ElementTree.Element("testsuites", name=_SUITE)
    suite = ElementTree.SubElement(root, "testsuite", name=f"{_SUITE} {gate.checkpoint} {gate.dtype}")
    facts = ElementTree.SubElement(suite, "properties")
    for name, value in {"sha256": gate.sha256 or "unknown", **gate.versions}.items():
        ElementTree.SubElement(facts, "property", name=name, value=str(value))
    failed = skipped = cases = 0
    for name, violations in _cases(gate):
        cases += 1
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{gate.checkpoint}.{gate.dtype}", name=name, time="0"
        )
        failed += bool(violations)
        for one in violations:
            failure = ElementTree.SubElement(case, "failure", type=one.limit, message=escaped(one.text))
            failure.text = escaped(one.text)
    if not gate.ran:
        cases, skipped = cases + 1, 1
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{gate.checkpoint}.{gate.dtype}", name="prompts", time="0"
        )
        ElementTree.SubElement(case, "skipped", message="nothing was run")
    counts = {"tests": str(cases), "failures": str(failed), "errors": "0", "skipped": str(skipped)}
    for element in (root, suite):
        element.attrib.update(counts)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _cases(gate: Gate) -> Iterator[tuple[str, list[Violation]]]:
    """Each limit that was judged, by the prompt where it is one of prompts, with what violates it."""
    yield "weights", [one for one in gate.violations if one.limit == "weights"]
    for prompt in gate.prompts:
        for limit in _judged(gate):
            yield (
                f"{prompt.name}: {limit}",
                [one for one in gate.violations if one.limit == limit and prompt.name in one.prompts],
            )
    if gate.compared:
        yield "baseline", [one for one in gate.violations if one.limit == "baseline"]


def _judged(gate: Gate) -> list[LimitName]:
    limits = gate.limits
    found: list[LimitName] = []
    violated = {one.limit for one in gate.violations}
    if limits.keeps_range or "range" in violated:
        found.append("range")
    if limits.min_headroom is not None:
        found.append("headroom")
    if limits.max_kl is not None:
        found += ["output", "kl"]
    return found
