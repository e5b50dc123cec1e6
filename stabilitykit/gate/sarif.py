"""A check as SARIF 2.1.0, which code scanning reads: a rule for each limit, a result for each violation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stabilitykit.files import write_json
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.records.document import finite_or_text
from stabilitykit.records.gate import Gate, LimitName, Violation

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What code scanning shows of a limit: a name, what holds where the limit is kept, what it means and what to do."""

    name: str
    holds: str
    means: str
    help: str


_RULES: dict[LimitName, _Rule] = {
    "weights": _Rule(
        "WeightsNotHeld",
        "Every stored weight is a number that the dtype holds.",
        "A weight is NaN or infinite in the file, or overflows when it is stored in the dtype that was checked.",
        "Convert the weights again from their source, use a dtype that holds them, or `stabilitykit repair` the model.",
    ),
    "range": _Rule(
        "OutOfRange",
        "Nothing that the model computes leaves the dtype's range.",
        "On a prompt of the check a tensor overflowed or became NaN. What it becomes downstream is in the message.",
        "`stabilitykit diagnose` tries what may cure it there; `stabilitykit repair` writes a model that fits.",
    ),
    "output": _Rule(
        "OutputNotFinite",
        "What the model returns is finite.",
        "The model returned inf or NaN on a prompt of the check, so that sampling raises or prints padding.",
        "`stabilitykit profile` names the tensor with which it began; `stabilitykit diagnose` tries what may cure it.",
    ),
    "headroom": _Rule(
        "TooLittleHeadroom",
        "Every stored tensor keeps the bits of headroom that were asked for.",
        "A tensor came closer to the dtype's maximum than --min-headroom allows; one bit is a factor of two.",
        "`stabilitykit repair` writes a model with the same function and more headroom.",
    ),
    "kl": _Rule(
        "FarFromFloat32",
        "The next-token distributions are as close to float32's as was asked for.",
        "The mean KL divergence from the float32 run, in nats a position, is past --max-kl.",
        "`stabilitykit diagnose` compares other dtypes and changes on the same prompt.",
    ),
    "baseline": _Rule(
        "HeadroomLost",
        "No tensor has lost more headroom since the baseline than may be lost.",
        "A tensor is closer to the dtype's maximum than when the baseline was written, by more than --tolerance bits.",
        "See what changed since (weights, versions, prompts); if it is meant, write the baseline again.",
    ),
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
                            {
                                "id": limit, "name": rule.name, "shortDescription": {"text": rule.holds},
                                "fullDescription": {"text": rule.means},
                                "help": {"text": rule.help.replace("`", ""), "markdown": rule.help},
                            }
                            for limit, rule in _RULES.items()
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
