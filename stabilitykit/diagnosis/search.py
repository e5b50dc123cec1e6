"""What a search for prompts that break comes to, in sentences."""

from collections import Counter

from stabilitykit.formats import number_format
from stabilitykit.records.search import KINDS, Find, Scan, Search, TokenPeak
from stabilitykit.words import counted, number, quoted


def with_bos(search: Search) -> str | None:
    """What `<bos>` alone does; None where it was not tried."""
    if search.bos is None:
        return None
    if search.bos.breaks:
        return f"With <bos> every prompt breaks, whatever follows: <bos> alone does. {search.bos.sentence}"
    return f"<bos> alone does not break {search.dtype}: {nearness(search.bos, search.dtype)}."


def _bos_breaks(search: Search) -> bool:
    return search.bos is not None and search.bos.breaks


def shortest(search: Search, bos: bool) -> str | None:
    """The shortest prompt that was found to break, or what came nearest; None where none were looked for."""
    finds = [find for find in search.finds if find.bos == bos]
    how, name = ("With", "after <bos>") if bos else ("Without", "alone")
    if not finds:
        if (bos and _bos_breaks(search)) or name not in {scan.name for scan in search.scans}:
            return None
        return f"{how} <bos> nothing was tried: of the tokens scanned none is text by itself."
    best = finds[0]
    if best.breaks:
        return f"{how} <bos> the shortest prompt found to break is {shown(best)}.{_least(search, best)} {best.sentence}"
    most = max(step.length for step in search.steps if step.bos == bos)
    longest = counted(most, "token")
    return (
        f"{how} <bos> nothing that was tried breaks {search.dtype}, prompts of up to {longest}. Nearest comes "
        f"{shown(best)}: {nearness(best, search.dtype)}."
    )


def _least(search: Search, best: Find) -> str:
    """Where every token was tried by itself and none broke, two are the fewest."""
    name = "after <bos>" if best.bos else "alone"
    alone = next((scan for scan in search.scans if scan.name == name), None)
    if alone is None or not alone.worst or len(best.tokens) != 2 + best.bos or alone.scanned < search.vocabulary:
        return ""
    nearest = alone.worst[0]
    if nearest.headroom is None or nearest.headroom <= alone.moved:
        return ""
    return f" None is shorter: {name} no token that is text comes nearer than {nearest.headroom:.2f} bits."


def shown(find: Find) -> str:
    """`'ow' 'ars' ' But'` (3 tokens)"""
    return f"{' '.join(map(quoted, find.pieces))} ({counted(len(find.tokens), 'token')})"


def nearness(found: Find | TokenPeak, dtype: str) -> str:
    """The largest value, where it stands, and how far from the format's end."""
    if found.value is None:
        return f"float32 itself is not finite there, in {place(found)}"
    if found.headroom is None:
        return f"everything is zero, in {place(found)}"
    side = "below" if found.headroom >= 0 else "past"
    end = number(number_format(dtype).largest)
    bits = f"{abs(found.headroom):.2f} bits {side} the format's end at {end}"
    return f"its largest value is {number(found.value)} in {place(found)}, {bits}"


def place(found: Find | TokenPeak) -> str:
    """`layer 7, residual after MLP`; the site where nobody named it."""
    layer = "" if found.layer is None else f"layer {found.layer}, "
    return f"{layer}{found.label or found.site}"


def of_what_kind(scan: Scan) -> str:
    """What the worst tokens of a scan are, and where the peaks of all of them stand."""
    told = (*scan.worst, *scan.by_ids)
    kinds = Counter(peak.kind for peak in scan.worst).most_common()
    sites = [f"{site} ({count / scan.scanned:.0%})" for site, count in scan.sites[:3] if count >= 0.01 * scan.scanned]
    parts = [f"{KINDS[kind]} ({count})" for kind, count in kinds]
    worst = f"The worst {len(scan.worst)} that are text: {', '.join(parts)}. " if parts else ""
    own = " <bos> has the position before, which does not count here." if scan.name == "after <bos>" else ""
    return f"{worst}Peaks stand most often in {', '.join(sites)}.{own}" if told else ""


def how_measured(search: Search) -> str:
    """What was computed, of how much, in which dtype, and what is not known of it."""
    scanned = max((scan.scanned for scan in search.scans), default=0)
    part = "all" if scanned == search.vocabulary else f"the first {scanned:,} of"
    checked = max((scan.checked for scan in search.scans), default=0)
    fast = next((scan.dtype for scan in search.scans if scan.dtype != "float32"), None)
    moved = max((scan.moved for scan in search.scans), default=0.0)
    sieve = ""
    if fast is not None:
        sieve = (
            f" A first look was taken in {fast}; the worst {checked:,} of each context were computed again in float32, "
            f"which moved them by at most {moved:.2f} bits."
        )
    return (
        f"For {part} {search.vocabulary:,} tokens the largest value at the token's own position, of all that a "
        f"{search.dtype} run stores in {search.dtype}, as float32 computes it.{sieve} The logits are left out of that, "
        "and counted where the recorder confirms: for the tokens and prompts that are shown."
    )
