"""What was measured, held against the limits: a violation for each that does not hold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from stabilitykit.diagnosis.weights import element
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.records import StoredWeights, WeightCounts
from stabilitykit.records.gate import Baseline, CheckedPrompt, Limits, SiteHeadroom, Violation
from stabilitykit.words import at_token, counted, listed, number, place_and_site

_NAMED = 3  # prompts in a sentence


def check_limits(limits: Limits) -> None:
    """Raises MisuseError for a limit that is no number, or that nothing could violate or keep."""
    for name, value, least in (
        ("min_headroom", limits.min_headroom, -math.inf),
        ("max_kl", limits.max_kl, 0.0),
        ("tolerance", limits.tolerance, 0.0),
    ):
        if value is not None and not (math.isfinite(value) and value >= least):
            allowed = "a finite number" + ("" if least < 0 else " of at least 0")
            raise MisuseError(f"{name} must be {allowed}, got {value}.")


def of_weights(stored: StoredWeights) -> list[Violation]:
    """One for each parameter that holds NaN or infinities, or elements that the dtype does not; the worst first."""
    lost = [one for one in stored.worst if one.nonfinite or one.overflow]
    told = [_weight(one, stored.dtype) for one in lost]
    left = stored.nonfinite + stored.overflow - sum(one.nonfinite + one.overflow for one in lost)
    if left:
        text = f"{counted(left, 'more element')} of other tensors, each with fewer, are not finite in {stored.dtype}."
        told.append(Violation(limit="weights", text=text, value=float(left), bound=0.0))
    return told


def _weight(counts: WeightCounts, dtype: str) -> Violation:
    form = number_format(dtype)
    at = "" if counts.block is None else f", in block {counts.block} of {counts.block_size} elements that share a scale"
    role = "" if counts.role is None else f" It is a {counts.role} of quantised weights."
    parts = []
    if counts.nonfinite:
        parts.append(
            f"{counts.nonfinite:,} of {counts.elements:,} elements are NaN or infinite in the checkpoint itself"
        )
    if counts.overflow:
        parts.append(f"{counts.overflow:,} of {counts.elements:,} exceed the {dtype} maximum, {number(form.largest)}")
    return Violation(
        limit="weights",
        text=f"{element(counts)}{at}: {listed(parts)}.{role}",
        site=counts.name,
        value=counts.value,
        bound=form.largest,
    )


def of_headroom(sites: Iterable[SiteHeadroom], least: float, dtype: str) -> list[Violation]:
    """One for each site with less than `least` bits, the worst first."""
    low = sorted((one for one in sites if one.headroom < least), key=lambda one: one.headroom)
    return [
        Violation(
            limit="headroom",
            text=f"{_begins(one)} has {_bits(one.headroom)} of headroom in {dtype}, and "
            f"{least:g} are asked for: {_magnitude(one)}{at_token(one.position, one.token)} of {one.prompt}.",
            site=one.site,
            label=one.label,
            layer=one.layer,
            value=one.headroom,
            bound=least,
            prompts=(one.prompt,),
        )
        for one in low
    ]


def of_kl(prompts: Iterable[CheckedPrompt], most: float) -> list[Violation]:
    """One for each prompt whose mean is past `most`. Positions that are not finite are an output's violation."""
    return [
        Violation(
            limit="kl",
            text=f"{one.name}: the mean KL divergence from float32 is {one.kl_mean:.3g} nats a token over "
            f"{counted(one.compared, 'token')}, {one.kl_max:.3g} at most, and {most:g} is the limit.",
            value=one.kl_mean,
            bound=most,
            prompts=(one.name,),
        )
        for one in prompts
        if one.kl_mean is not None and one.kl_max is not None and one.kl_mean > most
    ]


def of_outputs(prompts: Iterable[CheckedPrompt], dtype: str) -> list[Violation]:
    """One for each prompt whose outputs were compared and are not finite everywhere."""
    return [
        Violation(
            limit="output",
            text=f"{one.name}: what the model returns in {dtype} is not finite at "
            f"{one.positions - one.compared:,} of {counted(one.positions, 'position')}.",
            value=float(one.positions - one.compared),
            bound=0.0,
            prompts=(one.name,),
        )
        for one in prompts
        if one.compared < one.positions
    ]


def of_baseline(sites: Iterable[SiteHeadroom], baseline: Baseline, tolerance: float) -> list[Violation]:
    """One for each site that lost more than `tolerance` bits, the largest loss first."""
    found = []
    for one in sites:
        before = baseline.headroom.get(one.site)
        if before is None or not before - one.headroom > tolerance:  # inf - inf is NaN: nothing was lost
            continue
        lost = before - one.headroom
        text = (
            f"{_begins(one)} has {_bits(one.headroom)} of headroom, {number(before)} in the "
            f"baseline: a loss of {number(lost)}, and {tolerance:g} may be lost. Now it is {_magnitude(one)}"
            f"{at_token(one.position, one.token)} of {one.prompt}."
        )
        found.append(
            Violation(
                limit="baseline", text=text, site=one.site, label=one.label, layer=one.layer, value=one.headroom,
                bound=before - tolerance, prompts=(one.prompt,),
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (one.value or 0.0) - (one.bound or 0.0))


def merged(violations: Sequence[Violation]) -> list[Violation]:
    """Those of one limit at one site as one, with all their prompts; what it says is of the first."""
    kept: dict[tuple[str, str], list[Violation]] = {}
    for one in violations:
        kept.setdefault((one.limit, one.site or one.text), []).append(one)
    return [_together(group) for group in kept.values()]


def _together(group: Sequence[Violation]) -> Violation:
    prompts = tuple(dict.fromkeys(name for one in group for name in one.prompts))
    others = "" if len(prompts) < 2 else f" The same in {listed(prompts[1:], _NAMED)}."
    return replace(group[0], prompts=prompts, text=group[0].text + others)


def _magnitude(one: SiteHeadroom) -> str:
    return f"a magnitude of {number(one.amax)}"


def _bits(headroom: float) -> str:
    return "no bit" if headroom == -math.inf else f"{headroom:.2f} bits"


def _begins(one: SiteHeadroom) -> str:
    """A sentence's beginning; a site is a name in the user's code, and stays as it is."""
    text = place_and_site(one)
    return text if text.startswith(one.site) else text[:1].upper() + text[1:]


def least_by_site(found: Iterable[SiteHeadroom]) -> tuple[SiteHeadroom, ...]:
    """Of each site the one with the least headroom, those with the least first."""
    kept: dict[str, SiteHeadroom] = {}
    for one in found:
        if one.site not in kept or one.headroom < kept[one.site].headroom:
            kept[one.site] = one
    return tuple(sorted(kept.values(), key=lambda one: one.headroom))
