"""What a search for prompts that break comes to, in sentences."""

from collections import Counter

from stabilitykit.formats import number_format
from stabilitykit.records.search import KINDS, Find, Scan, Search, TokenPeak
from stabilitykit.words import counted, number, place, quoted


def with_bos(search: Search) -> str | None:
    """What `<bos>` alone does; None where it was not tried."""
    if search.bos is None:
        return None
    if search.bos.breaks:
        return f"With <bos> every prompt breaks, whatever follows, because <bos> alone does. {search.bos.sentence}"
    return f"<bos> alone does not break in {search.dtype}: {nearness(search.bos, search.dtype)}."


def _bos_breaks(search: Search) -> bool:
    return search.bos is not None and search.bos.breaks


def shortest(search: Search, bos: bool) -> str | None:
    """The shortest prompt that was found to break, or what came nearest; None where none were looked for."""
    finds = [find for find in search.finds if find.bos == bos]
    how, name = ("With", "after <bos>") if bos else ("Without", "alone")
    if not finds:
        if (bos and _bos_breaks(search)) or name not in {scan.name for scan in search.scans}:
            return None
        return f"{how} <bos> no prompt was tried: none of the tokens scanned is text by itself."
    best = finds[0]
    if best.breaks:
        return f"{how} <bos> the shortest prompt found to break is {shown(best)}.{_least(search, best)} {best.sentence}"
    most = max(step.length for step in search.steps if step.bos == bos)
    longest = counted(most, "token")
    return (
        f"{how} <bos> no prompt that was tried, up to {longest} long, breaks in {search.dtype}. {shown(best)} comes "
        f"nearest: {nearness(best, search.dtype)}."
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
    """The largest value, where it is, and its headroom."""
    if found.value is None:
        return f"even float32 is not finite there, in {place(found)}"
    if found.headroom is None:
        return f"everything is zero, in {place(found)}"
    side = "below" if found.headroom >= 0 else "above"
    maximum = f"the {dtype} maximum, {number(number_format(dtype).largest)}"
    room = f"{abs(found.headroom):.2f} bits {side} {maximum}"
    return f"its largest value is {number(found.value)} in {place(found)}, {room}"


def of_what_kind(scan: Scan) -> str:
    """What the worst tokens of a scan are, and where the peaks of all of them stand."""
    told = (*scan.worst, *scan.by_ids)
    kinds = Counter(peak.kind for peak in scan.worst).most_common()
    sites = [f"{site} ({count / scan.scanned:.0%})" for site, count in scan.sites[:3] if count >= 0.01 * scan.scanned]
    parts = [f"{KINDS[kind]} ({count})" for kind, count in kinds]
    worst = f"The worst {len(scan.worst)} that are text: {', '.join(parts)}. " if parts else ""
    own = " The position of <bos> itself does not count here." if scan.name == "after <bos>" else ""
    return f"{worst}Most peaks are in {', '.join(sites)}.{own}" if told else ""


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
            f" The first pass ran in {fast}; the worst {checked:,} of each context were computed again in float32, "
            f"which moved them by at most {moved:.2f} bits."
        )
    logits = "The logits are not part of that; they are for the tokens and prompts shown, which the recorder confirmed."
    if search.checkpoint.startswith("hf:"):  # every token was looked at by the recorder
        logits = "Logits are part of that. In a model that looks ahead, the value is the largest of the whole prompt."
    return (
        f"For {part} {search.vocabulary:,} tokens: the largest value at the token's own position, over all tensors "
        f"that a {search.dtype} run stores in {search.dtype}, as float32 computes it.{sieve} {logits}"
    )
