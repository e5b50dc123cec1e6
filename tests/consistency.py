"""Reads a report as people do, sentence by sentence, and holds each against the report's own tables.

Nothing of the package is used: the sentences are those of report.md, the tables those of its CSV files.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LARGEST = {
    "float32": 3.4028235e38,
    "bfloat16": 3.3895314e38,
    "float16": 65504.0,
    "float8_e5m2": 57344.0,
    "float8_e4m3fn": 448.0,
}
"""The largest finite value of each format."""

Row = dict[str, str]
_DTYPE = "|".join(LARGEST)


@dataclass(frozen=True)
class Page:
    """The Markdown's sections by their key, without escapes and tables, and the rows of each table by its name."""

    sections: dict[str, str]
    tables: dict[str, list[Row]]

    @classmethod
    def of(cls, markdown: str, tables: Mapping[str, str]) -> "Page":
        parts = re.split(r'<a id="([^"]+)"></a>', markdown)
        sections = {}
        for key, text in zip(parts[1::2], parts[2::2], strict=True):
            lines = [line for line in text.splitlines() if line and not line.startswith("|")]
            sections[key] = re.sub(r"\\([\\`*\[\]<>|~$#_+.)-])", r"\1", "\n".join(lines))
        return cls(sections, {name: list(csv.DictReader(io.StringIO(text))) for name, text in tables.items()})


@dataclass(frozen=True)
class Known:
    """What the tables know of one text in one dtype: at which lengths it broke in which sites, and where it did not."""

    broken: dict[int, set[str]]
    clean: set[int]

    @property
    def first(self) -> int:
        return min(self.broken)


def wrong(page: Page) -> list[str]:
    """What the sentences say that the tables do not; empty where they agree."""
    return [*_verdict(page), *_lengths_are_said(page), *_breaks(page), *_overflows(page), *_worst(page), *_widest(page)]


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def _texts(page: Page) -> dict[tuple[str, str, str], Known]:
    """By dtype, <bos> ("true", "false" or empty) and name."""
    found: dict[tuple[str, str, str], Known] = {}
    for row in page.tables.get("spans", []):
        known = found.setdefault((row["dtype"], row["<bos>"], row["text"]), Known({}, set()))
        lengths = range(int(row["from [tokens]"]), int(row["to [tokens]"]) + 1)
        if row["first break"]:
            for length in lengths:
                known.broken.setdefault(length, set()).add(row["first break"])
        else:
            known.clean.update(lengths)
    for row in page.tables.get("runs", []):
        known = found.setdefault((row["dtype"], row["<bos>"], row["text"]), Known({}, set()))
        length = int(row["length [tokens]"])
        if row["first break"]:
            known.broken.setdefault(length, set()).add(row["first break"])
        else:
            known.clean.add(length)
    return found


def _layer(site: str) -> str:
    inside = re.match(r"layers\.(\d+)", site)
    return f"layer {inside[1]}" if inside else f"`{site}`"


def _verdict(page: Page) -> Iterator[str]:
    text = page.sections.get("verdict", "")
    rows = {row["dtype"]: row for row in page.tables.get("verdict", [])}
    texts = _texts(page)
    named = re.findall(
        rf"\*\*({_DTYPE}) breaks in (?:layer \d+, )?.*?`([^`]+)`\)?(?:, at token .*?)?\*\*, in `([^`]+)`"
        r"(?: (with|without) `<bos>`)? at ([\d,]+) tokens?, (the one length that ran|the shortest that breaks)",
        text,
    )
    said = {dtype: (site, name, bos, int(_number(length)), how) for dtype, site, name, bos, length, how in named}
    for dtype, row in rows.items():
        own = {key: known for key, known in texts.items() if key[0] == dtype}
        broken = {key: known for key, known in own.items() if known.broken}
        if (int(row["broken"]) > 0) != bool(broken):
            yield f"By dtype counts {row['broken']} broken cases of {dtype}; the tables of lengths have {len(broken)}"
        if broken and dtype not in said:
            yield f"nothing says where {dtype} breaks"
        if not broken and dtype in said:
            yield f"{dtype} is said to break, and no table has it"
        if broken and dtype in said:
            site, name, bos, length, how = said[dtype]
            least = min(known.first for known in broken.values())
            of = own.get((dtype, {"with": "true", "without": "false", "": ""}[bos], name), Known({}, set()))
            if not length == least == int(row["shortest broken length [tokens]"]) or site not in of.broken.get(
                length, ()
            ):
                yield f"{dtype} breaks at {length} tokens of {name} in {site}: the tables say {least}, {of.broken}"
            if site != row["first break there"]:
                yield f"{dtype} breaks in {site}, and By dtype has {row['first break there']}"
            alone = sum(len(known.broken) + len(known.clean - set(known.broken)) for known in own.values()) == 1
            if (how == "the one length that ran") != alone:
                yield f"{how}: of {dtype}"
        clean = re.search(rf"\b{dtype} \(([\d,]+|no) cases?(?:, at least (-?[\d.]+) bits? of headroom)?\)", text)
        if int(row["finished"]) and (clean is not None) != (int(row["broken"]) == 0):
            yield f"{dtype} is {'' if clean else 'not '}said to be clean, with {row['broken']} broken cases"
        if clean is not None and clean[1] != row["finished"]:
            yield f"{dtype}: {clean[1]} cases are said to be clean, {row['finished']} have finished"
        if clean is not None and clean[2] and abs(_number(clean[2]) - _number(row["least headroom [bits]"])) > 0.051:
            yield f"{dtype}: {clean[2]} bits of headroom are said, {row['least headroom [bits]']} are in the table"
    if ("**Nothing" in text) != (bool(rows) and all(int(row["broken"]) == 0 for row in rows.values())):
        yield "that nothing breaks is said where something does, or is not said"
    yield from _stories(text, texts)
    top = re.search(r"the largest value that (\w+) stored, ([\d,.e+-]+) in `([^`]+)`, would (overflow|leave)", text)
    peaks = [_number(row["peak"]) for row in page.tables.get("peaks", []) if row["peak"] and not row["first break"]]
    if top is not None and peaks and max(peaks) > _number(top[2]) * 1.001:
        yield f"{top[2]} is said to be the largest value that was stored, and a run holds {max(peaks)}"


_OF_TEXTS = re.compile(
    r"(With `<bos>`, |Without `<bos>`, |(?<=\. ))"
    r"((?:the one text|both texts|all [\d,]+ texts|[\d,]+ of [\d,]+ texts) (?:breaks?|is|are)\b.*?)"
    r"(?=\. (?:With|What|Sampling|In |No |The one|Both|All|[\d,]+ of|[a-z]+\d+ )|\.$|\. \*\*)",
    flags=re.IGNORECASE | re.DOTALL,
)


def _stories(text: str, texts: Mapping[tuple[str, str, str], Known]) -> Iterator[str]:
    """The sentences on which texts break, at which lengths and where."""
    parts = re.split(rf"\*\*({_DTYPE}) breaks in ", text)
    for dtype, told in zip(parts[1::2], parts[2::2], strict=True):
        for bos, sentence in _OF_TEXTS.findall(told):
            flag = {"with `<bos>`, ": "true", "without `<bos>`, ": "false"}.get(bos.lower(), "")
            own = {name: known for (of, bos_, name), known in texts.items() if of == dtype and bos_ == flag}
            broken = {name: known for name, known in own.items() if known.broken}
            yield from (f"{dtype}: {sentence!r}: {problem}" for problem in _story(sentence, own, broken))


def _story(sentence: str, own: Mapping[str, Known], broken: Mapping[str, Known]) -> Iterator[str]:
    counted = re.match(r"(the one|both|all ([\d,]+)|([\d,]+) of ([\d,]+)) texts?", sentence, re.IGNORECASE)
    assert counted is not None
    if " clean" in sentence and not broken:
        return
    many = counted[3] or counted[2] or {"the one": "1", "both": "2"}[counted[1].lower()]
    if int(_number(many)) != len(broken):
        yield f"{many} texts, and {len(broken)} break"
    if counted[4] and int(_number(counted[4])) != len(own):
        yield f"of {counted[4]} texts, and there are {len(own)}"
    if "length that ran" in sentence or "lengths that ran" in sentence:
        every = [name for name, known in broken.items() if not known.clean]
        if not every:
            yield "no text breaks at every length that ran"
    for name in re.findall(r"`([^`]+)` at (?:every length|all [\d,]+ lengths) that ran", sentence):
        if name in broken and broken[name].clean:
            yield f"{name} breaks at every length, and is clean at {len(broken[name].clean)}"
    one = re.search(r"at ([\d,]+) tokens?, the one length that ran", sentence)
    if one is not None and not any({int(_number(one[1]))} == set(k.broken) | k.clean for k in broken.values()):
        yield "no text ran at one length alone"
    for name, first, last in re.findall(r"`([^`]+)`(?: \([^)]*\))? from ([\d,]+) to ([\d,]+) tokens", sentence):
        if name in broken:
            known = broken[name]
            if (int(_number(first)), int(_number(last))) != (known.first, max(known.broken)):
                yield f"{name} from {first} to {last}: the tables have {known.first} to {max(known.broken)}"
    for first, last in re.findall(r"from ([\d,]+) to ([\d,]+) tokens", sentence):
        ends = [(known.first, max(known.broken)) for known in broken.values()]
        ends += [(min(k.clean | set(k.broken)), max(k.clean | set(k.broken))) for k in broken.values()]
        if (int(_number(first)), int(_number(last))) not in ends:
            yield f"from {first} to {last} tokens: of no text"
    for place, length in re.findall(r"(layer \d+|`[^`']+`) from ([\d,]+)(?: tokens)?(?=[,);]|\Z| and)", sentence):
        sites = (site for known in broken.values() for site in known.broken.get(int(_number(length)), ()))
        if place not in map(_layer, sites):
            yield f"{place} from {length} tokens: no text breaks there"
    for name, known in broken.items():
        if not any(_layer(site) in sentence for site in known.broken[known.first]):
            yield f"{name} breaks in {known.broken[known.first]} at {known.first} tokens, which is not said"
        layers = {_layer(min(sites)) for sites in known.broken.values() if len(sites) == 1}
        if len(layers) < 5 and not all(layer in sentence for layer in layers):
            yield f"{name} breaks in {sorted(layers)}, at one length or another, and not all of them are said"


def _lengths_are_said(page: Page) -> Iterator[str]:
    """Each sentence that says that a dtype breaks has a number of tokens."""
    for key, text in page.sections.items():
        for line in text.splitlines():
            for said in re.findall(rf"(?:{_DTYPE}) (?:breaks|overflows) (?:first |at |in )[^.;]*", line):
                if not re.search(r"\d tokens?\b", said) and not re.search(r"\d tokens?\b", line):
                    yield f"{key}: {said!r} says nothing of the length"


def _groups(page: Page) -> dict[str, dict[str, Row]]:
    """By the name of a group of runs and by dtype, what the table of peaks has."""
    found: dict[str, dict[str, Row]] = {}
    for row in page.tables.get("peaks", []):
        found.setdefault(row["run"], {})[row["dtype"]] = row
    return found


def _group_of(line: str, groups: Mapping[str, dict[str, Row]]) -> str | None:
    named = [name for name in groups if re.search(rf"(?<![\w,]){re.escape(name)}(?!, \w+ [\d])", line)]
    return max(named, key=len, default=None)


def _breaks(page: Page) -> Iterator[str]:
    """Each sentence on where a run breaks, against the table of peaks; and each break of a drawn group is told."""
    groups = _groups(page)
    for key, text in page.sections.items():
        for line in text.splitlines():
            name = _group_of(line, groups)
            for dtype, length, place in re.findall(
                rf"({_DTYPE}) breaks at ([\d,]+) tokens? in (.+?)(?=, at token |[.;]|$)", line
            ):
                if name is None:
                    continue
                row = groups[name].get(dtype, {})
                if row.get("first break") != place:
                    yield f"{key}: {dtype} breaks in {place} ({name}): the table has {row.get('first break')!r}"
                if f"{length} token" not in name:
                    yield f"{key}: {dtype} breaks at {length} tokens, in {name}"
        for line in text.splitlines():
            lead = re.match(r"\*\*(.+?)\*\*(?:, \w+ run)?: ", line)
            if key in ("peaks", "heat", "exponents") and lead is not None and lead[1] in groups:
                for dtype, row in groups[lead[1]].items():
                    if row["first break"] and f"{dtype} breaks at" not in line:
                        yield f"{key}: that {dtype} breaks is not told of {lead[1]}"


def _slug(name: str) -> str:
    return "with-bos" if name.endswith("with <bos>") else "without-bos" if name.endswith("without <bos>") else "any"


def _run_of(row: Row) -> str:
    """The name of the group that a single run is in."""
    tokens = "1 token" if row["length [tokens]"] == "1" else f"{int(row['length [tokens]']):,} tokens"
    bos = {"true": ", with <bos>", "false": ", without <bos>", "": ""}[row["<bos>"]]
    return f"{row['text']}, {tokens}{bos}"


def _overflows(page: Page) -> Iterator[str]:
    groups = _groups(page)
    for line in page.sections.get("heat", "").splitlines():
        lead = re.match(r"\*\*(.+?)\*\*: ", line)
        if lead is None or lead[1] not in groups:
            continue
        rows = groups[lead[1]]
        least = page.tables.get(f"headroom-{_slug(lead[1])}", [])
        none = re.search(rf"No value of the .*? of the (\w+) run( up to its break[^.]*)? overflows ({_DTYPE})\.", line)
        some = re.search(rf"([\d,]+) of [\d,]+ tensors? .*? holds? a value that overflows ({_DTYPE})\.", line)
        if (none is None) == (some is None):
            yield f"{lead[1]}: whether something overflows is not said, or twice"
            continue
        held = [_number(row["largest"]) for row in least]
        if none is not None:
            most = max([*held, *(_number(row["peak"]) for row in rows.values() if row["peak"])], default=0.0)
            if most > LARGEST[none[3]]:
                yield f"{lead[1]}: no value overflows {none[3]}, and a run holds {most}"
            own = [row for row in page.tables.get("runs", []) if _run_of(row) == lead[1] and row["dtype"] == none[1]]
            if none[1] == none[3] and any(row["headroom [bits]"].startswith("-") for row in own):
                yield f"{lead[1]}: no value overflows {none[3]}, and in its run one did"
            if bool(none[2]) != bool(rows[none[1]]["first break"]):
                yield f"{lead[1]}: up to a break or not, of the {none[1]} run"
            if none[2] and not all(row["first break"] for row in rows.values()):
                yield f"{lead[1]}: judged up to a break, where another run did not break"
        if some is not None and not any(value > LARGEST[some[2]] for value in held):
            yield f"{lead[1]}: {some[1]} tensors overflow {some[2]}, and the table's largest is {max(held, default=0)}"
        room = re.search(r"the least headroom in the (\w+) run.*? is (-?[\d.]+) bits, in (.+?)(?:, at token|\.)", line)
        form = (none or some)[3 if none else 2]  # type: ignore[index]
        if room is not None and least:
            lowest = min(_number(row[f"{form} [bits]"]) for row in least)
            if abs(lowest - _number(room[2])) > 0.051:
                yield f"{lead[1]}: the least headroom is said to be {room[2]}, and the table has {lowest}"
    for line in page.sections.get("exponents", "").splitlines():
        lead = re.match(r"\*\*(.+?)\*\*, (\w+) run: ", line)
        if lead is None:
            continue
        shown = page.tables[f"exponent-counts-{_slug(lead[1])}"]
        said = re.search(rf"none of the elements shown would overflow in ({_DTYPE})", line)
        if said is not None:
            past = [row for row in shown if _number(row["largest"]) > LARGEST[said[1]]]
            if past or any(int(row[f"{said[1]} overflow"]) for row in shown):
                yield f"exponents of {lead[1]}: none would overflow, and the table has {past}"
        would = re.search(rf"({_DTYPE}) (?:would overflow|overflows) in \d", line)
        if would is not None and not any(int(row[f"{would[1]} overflow"]) for row in shown):
            yield f"exponents of {lead[1]}: some would overflow in {would[1]}, and the table has none"


def _worst(page: Page) -> Iterator[str]:
    """The sites where a run of a group broke are among its worst ones, in both sections that list such."""
    for name, rows in _groups(page).items():
        drawn = page.sections.get("exponents", "").find(f"**{name}**") >= 0
        widest = _widest_of(rows)
        for dtype, row in rows.items():
            place = re.fullmatch(r"layer (\d+), (.+)", row["first break"])
            if not drawn or place is None:
                continue
            shown = {(one["layer"], one["site"]) for one in page.tables[f"exponent-counts-{_slug(name)}"]}
            held = {one["site"] for one in page.tables.get(f"headroom-{_slug(name)}", [])}
            if (place[1], place[2]) not in shown:
                yield f"the worst sites of {name} leave out {row['first break']}, where {dtype} broke"
            if held and place[2] not in held and dtype == widest:
                yield f"the least headroom of {name} leaves out {place[2]}, where {dtype} broke"


def _widest_of(rows: Mapping[str, Row]) -> str:
    """A run that did not break before one that did; of these that of the largest range."""
    return max(rows, key=lambda dtype: (not rows[dtype]["first break"], LARGEST[dtype]))


def _widest(page: Page) -> Iterator[str]:
    groups = _groups(page)
    for key in ("heat", "exponents"):
        seen: set[str] = set()
        for dtype, name in re.findall(r"\*\*[^*]*?, (\w+) run: ([^*]+)\*\*", page.sections.get(key, "")):
            if name in groups and name not in seen and dtype != _widest_of(groups[name]):
                yield f"{key}: {name} is shown by its {dtype} run, and its {_widest_of(groups[name])} run is wider"
            seen.add(name)
