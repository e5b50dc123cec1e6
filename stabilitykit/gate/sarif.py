"""A check as SARIF 2.1.0, which code scanning reads: a rule for each limit, a result for each violation."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from stabilitykit.files import write_json
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.records.document import finite_or_text
from stabilitykit.records.gate import Gate, LimitName, Violation

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_RULES: dict[LimitName, tuple[str, str]] = {
    "weights": ("WeightsNotHeld", "Every stored weight is a number that the dtype holds."),
    "range": ("OutOfRange", "Nothing that the model computes leaves the dtype's range."),
    "output": ("OutputNotFinite", "What the model returns is finite."),
    "headroom": ("TooLittleHeadroom", "Every stored tensor keeps the bits of headroom that were asked for."),
    "kl": ("FarFromFloat32", "The next-token distributions are as close to float32's as was asked for."),
    "baseline": ("HeadroomLost", "No tensor has lost more headroom since the baseline than may be lost."),
}


def write_sarif(path: Path, gate: Gate) -> None:
    """Replaces an existing file. Raises MisuseError where it cannot be written."""
    write_json(path, sarif(gate))


def sarif(gate: Gate) -> dict[str, Any]:
    """The log, as JSON values. A weight or tensor is a logical location in the checkpoint's folder or file."""
    names = list(_RULES)
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "stabilitykit",
                        "version": gate.versions["stabilitykit"],
                        "rules": [
                            {"id": limit, "name": name, "shortDescription": {"text": text}}
                            for limit, (name, text) in _RULES.items()
                        ],
                    }
                },
                "invocations": [
                    {"executionSuccessful": True, **({"commandLine": gate.command} if gate.command else {})}
                ],
                "results": [_result(gate, one, names.index(one.limit)) for one in gate.violations],
                "properties": {
                    "dtype": gate.dtype, "sha256": gate.sha256 or "unknown", "versions": dict(gate.versions)
                },
            }
        ],
    }  # fmt: skip


def _result(gate: Gate, one: Violation, rule: int) -> dict[str, Any]:
    place: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(gate)}, "region": {"startLine": 1}}}
    if one.site is not None:
        kind = "resource" if one.limit == "weights" else "member"
        place["logicalLocations"] = [{"fullyQualifiedName": one.site, "kind": kind}]
    return {
        "ruleId": one.limit,
        "ruleIndex": rule,
        "level": "error",
        "message": {"text": one.text},
        "locations": [place],
        "partialFingerprints": {"limitAndSite/v1": f"{one.limit} {one.site or ' '.join(one.prompts)} {gate.dtype}"},
        "properties": {
            "value": finite_or_text(one.value), "bound": finite_or_text(one.bound), "layer": one.layer,
            "prompts": list(one.prompts),
        },
    }  # fmt: skip


def _uri(gate: Gate) -> str:
    """The checkpoint's path as a relative reference; a name that is no path is escaped so that it is read as one."""
    return quote(str(gate.checkpoint).removeprefix(PREFIX))
