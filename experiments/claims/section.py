"""The claims of a widely read deployment guide, each judged by the cases of the sweep in `claims.toml`.

The guide's origin is google/gemma_pytorch, issue 26. A claim that the finished cases cannot decide is left open, with
what would decide it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Prose, Section, Table
from stabilitykit.report.outcomes import Outcome, Text, outcomes, texts
from stabilitykit.report.parts.by_length import break_map
from stabilitykit.report.sections.memory import footprint_figure
from stabilitykit.report.style import share, size
from stabilitykit.report.words import at_broken_token, happened, located
from stabilitykit.words import code, count, grouped, listed, quoted, with_bos

from .figures import OF_SHORTAGE, SHARE, bars, largest_values, tally

Verdict = Literal["holds", "does not hold", "cannot be decided here"]

QUOTED = "Of course! Here are some creative ideas for a 10-year-old's birthday party:"

_OPEN: Verdict = "cannot be decided here"

GUIDE_MODEL = "gemma-7b"
CARD = 24e9  # bytes of the GPU memory that the guide asks for
NEXT_SMALLER_CARD = 16e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the guide says, how it was tested, what came of it and why; `blocks` show it."""

    says: str
    experiment: str
    verdict: Verdict
    why: str
    blocks: Sequence[Figure | Table] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The finished cases: `found` of all prompts; `runs` are those of single prompts, `maps` ranges of lengths."""

    results: Results
    found: Sequence[Outcome]

    @property
    def runs(self) -> list[Outcome]:
        return [outcome for outcome in self.found if outcome.case.kind == "run"]

    @property
    def maps(self) -> list[Outcome]:
        return [outcome for outcome in self.found if outcome.case.kind == "lengths"]

    def next_text(self, outcome: Outcome) -> str | None:
        """The token that greedy decoding takes after the prompt."""
        told = self.results.recording(outcome.case).header.case.get("next_text")
        return None if told is None else str(told)


def section(results: Results) -> Section:
    """One verdict a claim, and what it rests on."""
    evidence = Evidence(results=results, found=outcomes(results))
    claims = [claim(evidence) for claim in CLAIMS]
    tally = Counter(claim.verdict for claim in claims)
    said = listed([f"{amount:,} {_plural(verdict, amount)}" for verdict, amount in sorted(tally.items())])
    blocks: list[Block] = [Prose(f"Of {len(claims)} claims, {said}."), _table(claims)]
    for number, claim in enumerate(claims, start=1):
        blocks.append(
            Prose(f"**{number}. {claim.says}** {claim.experiment} **{_capital(claim.verdict)}.** {claim.why}")
        )
        blocks += claim.blocks
    model = results.plan.checkpoint
    return Section(
        key="claims",
        title="Claims",
        opening="What a widely read guide says of gemma-7b-it in float16, and what happens when it is tried. The tests "
        f"run {model}, a smaller model of the same family: a mechanism that shows here is real, but a number of tokens "
        "or bytes is this model's own unless said otherwise.",
        blocks=blocks,
    )


def _plural(verdict: Verdict, amount: int) -> str:
    return verdict.replace("holds", "hold").replace("does", "do") if amount != 1 else verdict


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(claims: Sequence[Claim]) -> Table:
    return Table(
        name="claims",
        title="Claim by claim",
        columns=[Column("claim"), Column("experiment"), Column("verdict"), Column("shown in")],
        rows=[
            [claim.says, claim.experiment, claim.verdict, listed([block.title for block in claim.blocks]) or None]
            for claim in claims
        ],
    )


# The claims, in the guide's order


def _fixed_answer(evidence: Evidence) -> Claim:
    low = [run for run in evidence.runs if run.dtype == "float16"]
    lost = [run for run in low if run.first is not None and not run.hidden]
    sound = [run for run in low if run.first is None]
    pairs = [(run, _same(evidence.runs, run, "float32")) for run in sound]
    alike = [evidence.next_text(run) == evidence.next_text(wide) for run, wide in pairs if wide is not None]
    printed = listed(_answers(evidence, lost), most=4)
    why = (
        f"In {len(lost):,} of {count(len(low), 'float16 run')} every logit is lost, and greedy decoding then takes "
        f"{printed}, the argmax of NaN, whatever was asked: a fixed output, but no sentence. "
        + (
            f"Of the runs that stay finite {sum(alike):,} of {len(alike):,} take the token that float32 takes. "
            if alike
            else ""
        )
        + f"The sentence that the guide quotes, “{QUOTED}”, is the worked example in FastChat's `one_shot` prompt "
        "template (fschat 0.2.36): text that goes in, not what a number format makes of it. Whether gemma-7b-it "
        "repeats its prompt's example would be decided by running that template on its weights in float32."
    )
    return Claim(
        says="In float16 the model returns one fixed answer.",
        experiment="Short prompts in every dtype: which token comes next?",
        verdict="does not hold"
        if lost and not any((evidence.next_text(run) or "?") in QUOTED for run in lost)
        else _OPEN,
        why=why if lost else "No float16 run has broken, so there is no answer to look at.",
        blocks=[_next_tokens(evidence)] if low else [],
    )


def _raises(evidence: Evidence) -> Claim:
    drawn = [run for run in evidence.runs if run.case.settings["temperature"] > 0]
    raised = [run for run in drawn if run.error is not None]
    low = [run for run in drawn if run.dtype == "float16"]
    others = [run for run in raised if run.dtype != "float16"]
    errors = listed([code(text) for text in dict.fromkeys(str(run.error) for run in raised)], most=2)
    greedy = [run for run in evidence.runs if run.dtype == "float16" and run.case.settings["temperature"] == 0]
    silent = [run for run in greedy if run.first is not None and run.error is None]
    why = (
        f"{len(raised):,} of {count(len(low), 'float16 run')} that draw a token raise {errors}; "
        f"{'none' if not others else f'{len(others):,}'} of {len(drawn) - len(low):,} in other dtypes does. "
        f"Greedy decoding never draws: {len(silent):,} of {count(len(greedy), 'greedy run')} lose their logits, and "
        "none of these raises anything."
    )
    return Claim(
        says="In float16 it raises RuntimeError: probability tensor contains either inf, nan or element < 0.",
        experiment="The same prompts, a token drawn after each.",
        verdict=_judge(low, holds=bool(raised) and not others),
        why=why if low else "No float16 run has drawn a token.",
        blocks=[bars("claims-raised", "What happens after the prompt", tally(evidence.runs))] if low else [],
    )


def _cause_float16(evidence: Evidence) -> Claim:
    low = [o for o in evidence.found if o.dtype == "float16"]
    broken = [o for o in low if o.first is not None]
    wide = [o for o in evidence.found if o.dtype != "float16"]
    sound = not any(o.first is not None for o in wide)
    why = f"No float16 case has broken among {count(len(low), 'case')}."
    if broken:
        first = min(broken, key=lambda o: o.first.first if o.first else 0).first
        assert first is not None
        why = (
            f"{len(broken):,} of {count(len(low), 'float16 case')} {_break(broken)}, first in {located(first)}"
            f"{at_broken_token(first)}: {happened(first, 'float16')}. The same texts in wider formats: "
            f"{sum(o.first is not None for o in wide):,} of {len(wide):,} break."
        )
    return Claim(
        says="float16 is a cause.",
        experiment="The same texts, lengths and weights in every dtype; only the number format differs.",
        verdict=_judge(broken and wide, holds=sound and all(o.is_of_range for o in broken)),
        why=why,
        blocks=[figure] if (figure := largest_values(evidence.found)) is not None else [],
    )


def _cause_memory(evidence: Evidence) -> Claim:
    tried = [shortage for _, shortage in evidence.results.shortages()]
    short = [shortage for shortage in tried if shortage.outcome in ("raised", "killed")]
    lost = [shortage for shortage in tried if shortage.outcome == "not finite"]
    reasons = listed([code(text) for text in dict.fromkeys(_reason(s.reason) for s in short)], most=2)
    why = "No prompt has run short of memory."
    if tried:
        enough = sum(shortage.outcome == "finite" for shortage in tried)
        why = (
            f"{len(short):,} of {count(len(tried), 'run')} got too little and ended with {reasons}; {enough:,} had "
            f"enough, and their logits are finite. {'None' if not lost else f'{len(lost):,}'} gave NaN: memory that is "
            "missing is refused, and no number changes."
        )
    rows = [
        (f"{s.dtype}, {size(s.room)} of {size(s.needed)}", {OF_SHORTAGE[s.outcome]: s.room / s.needed}) for s in tried
    ]
    return Claim(
        says="Too little GPU memory is a cause.",
        experiment="Prompts in a process that may take only a share of the memory they need beside the weights"
        f"{_where([s.device for s in tried])}.",
        verdict=_judge(short, holds=bool(lost)),
        why=why,
        blocks=[bars("claims-shortage", "What becomes of a prompt with too little memory", rows, unit=SHARE)]
        if tried
        else [],
    )


def _cause_length(evidence: Evidence) -> Claim:
    own = [text for text in texts(evidence.maps) if text.dtype == "float16"]
    begun = [text for text in own if text.bos]
    bare = [text for text in own if not text.bos]
    at_one = [text for text in begun if text.spans[0].broke is not None]
    never = [text for text in bare if not text.broken]
    late = [text for text in bare if text.broken]
    starts = listed([f"{text.name} from {count(text.broken[0].first, 'token')} on" for text in late])
    longest = max((span.last for text in own for span in text.spans), default=0)
    why = (
        f"With `<bos>` {len(at_one):,} of {count(len(begun), 'text')} {_break(at_one)} with a single token. Without "
        f"it {starts or 'nothing'} {_break(late or [None])}{_among(never, longest)}. What decides is whether a token "
        "that grows too large is among those read; a longer prompt only holds more of them."
    )
    return Claim(
        says="Long prompts are a cause.",
        experiment=f"Every length from 1 to {longest:,} tokens, with and without `<bos>`.",
        verdict=_judge(own, holds=bool(late) and not at_one and not never),
        why=why if own else "No range of lengths has finished in float16.",
        blocks=[break_map(own, name="claims-lengths")] if own else [],
    )


def _cure(dtype: str, evidence: Evidence) -> Claim:
    broken = {_key(o) for o in evidence.found if o.dtype == "float16" and o.first is not None}
    own = [o for o in evidence.found if o.dtype == dtype and _key(o) in broken]
    cured = [o for o in own if o.first is None and o.error is None]
    why = f"None of the cases that break in float16 has finished in {dtype}."
    if own:
        room = min((o.headroom for o in own if o.headroom is not None), default=None)
        spare = "" if room is None else f", with at least {room:.0f} bits to spare"
        which = f"All {len(own):,}" if len(cured) == len(own) else f"{len(cured):,} of the {len(own):,}"
        why = f"{which} cases that break in float16 and ran in {dtype} are clean there{spare}."
        why += _price(evidence, dtype)
    return Claim(
        says=f"{dtype} is a cure.",
        experiment=f"What breaks in float16, in {dtype}.",
        verdict=_judge(own, holds=len(cured) == len(own)),
        why=why,
        blocks=[bars(f"claims-{dtype}", f"The cases that break in float16, in {dtype}", tally(own))] if own else [],
    )


def _cure_length(evidence: Evidence) -> Claim:
    own = [text for text in texts(evidence.maps) if text.dtype == "float16" and text.broken]
    rows: list[list[Cell]] = []
    for text in own:
        clean = next((span for span in text.spans if span.broke is None), None)
        first = text.broken[0]
        rows.append([text.name, text.bos, None if clean is None else first.first - 1, first.first, first.site])
    never = [text for text in own if text.spans[0].broke is not None]
    short = [row for row in rows if row[2] is not None]
    helped = listed([f"{row[0]} {with_bos(bool(row[1]))} up to {row[2]:,}" for row in short])
    why = f"{len(never):,} of {count(len(own), 'text')} that break do so with one token, and nothing is shorter. " + (
        f"The others fit when cut, {helped} tokens, a length that nobody knows before it was tried." if short else ""
    )
    table = Table(
        name="claims-longest-clean",
        title="The longest prompt that float16 holds",
        columns=[
            Column("text"),
            Column("<bos>"),
            Column("clean up to", unit="tokens", format=grouped),
            Column("breaks from", unit="tokens", format=grouped),
            Column("in"),
        ],
        rows=rows,
    )
    return Claim(
        says="Shorter prompts are a cure.",
        experiment="The texts that break at some length, shortened token by token.",
        verdict=_judge(own, holds=not never),
        why=why if own else "No text has broken at any length.",
        blocks=[table] if own else [],
    )


def _card(evidence: Evidence) -> Claim:
    own = [
        (footprint, str(case.settings["model"]))
        for case, footprint in evidence.results.footprints()
        if case.settings["model"] == GUIDE_MODEL
    ]
    narrow = [footprint for footprint, _ in own if footprint.dtype in ("float16", "bfloat16")]
    wide = [footprint for footprint, _ in own if footprint.dtype == "float32"]
    measured = [abs(memory.error) for _, memory in evidence.results.memories()]
    why = f"Nothing was computed for {GUIDE_MODEL}."
    if narrow:
        least = min(narrow, key=lambda f: f.computed)
        fits = [f for f in narrow if f.computed <= CARD]
        longest = max(fits, key=lambda f: f.length, default=None)
        why = (
            f"{GUIDE_MODEL} in 16 bits takes {_gigabytes(least.computed)} with {count(least.length, 'token')}, "
            f"{_gigabytes(least.weights)} of them weights: "
            f"{'more than' if least.computed > NEXT_SMALLER_CARD else 'no more than'} 16 GB, the next smaller size. "
        )
        if longest is not None:
            why += f"Of the lengths computed 24 GB hold {longest.length:,} tokens ({_gigabytes(longest.computed)})"
            why += " and no more. " if len(fits) < len(narrow) else ". "
        if wide:
            most = min(wide, key=lambda f: f.computed)
            which = "24 GB do not hold" if most.computed > CARD else "24 GB hold too"
            why += f"In float32, the guide's own cure, it takes {_gigabytes(most.computed)}, which {which}. "
        if measured:
            why += "Computed, not measured; for the model of this report the same computation is within "
            why += f"{share(max(measured))}."
    return Claim(
        says="24 GB of GPU memory are needed.",
        experiment=f"Weights, KV cache and activations of {GUIDE_MODEL}, computed from its config for a GPU.",
        verdict=_judge(
            narrow,
            holds=bool(narrow) and NEXT_SMALLER_CARD < min(f.computed for f in narrow) <= CARD,
        ),
        why=why,
        blocks=[
            footprint_figure(
                [footprint for footprint, _ in own],
                name="claims-card",
                title=f"What {GUIDE_MODEL} takes, and what 24 GB hold",
                caption="Computed from the config, without what libraries take. The broken line: a card of 24 GB, "
                "or 22.4 GiB.",
                limit=CARD,
            )
        ]
        if own
        else [],
    )


def _cpu(evidence: Evidence) -> Claim:
    own = [o for o in evidence.found if o.dtype != "float32" and str(o.case.settings["device"]) == "cpu"]
    clean = {
        dtype: [o for o in own if o.dtype == dtype and o.first is None] for dtype in dict.fromkeys(o.dtype for o in own)
    }
    sound = [dtype for dtype, cases in clean.items() if cases and len(cases) == sum(o.dtype == dtype for o in own)]
    memory = {m.dtype: m for _, m in evidence.results.memories() if m.device == "cpu"}
    told = [
        f"{dtype} is clean in {len(cases):,} of {count(sum(o.dtype == dtype for o in own), 'case')}"
        for dtype, cases in clean.items()
    ]
    weights = listed([f"{size(memory[dtype].weights)} in {dtype}" for dtype in ("float32", *sound) if dtype in memory])
    why = f"On this machine's CPU {listed(told)}. " + (f"Weights take {weights}. " if weights else "")
    why += (
        "What float32 has for it on a CPU is accuracy and, where there are no instructions for 16-bit products, speed, "
        "which this report does not measure."
    )
    return Claim(
        says="Without a GPU it must run in float32.",
        experiment="The 16-bit formats on a CPU.",
        verdict=_judge(own, holds=not sound),
        why=why if own else "Nothing has run in 16 bits on a CPU.",
        blocks=[bars("claims-cpu", "Prompts on a CPU", tally(own))] if own else [],
    )


def _check(evidence: Evidence) -> Claim:
    broken = [run for run in evidence.runs if run.first is not None]
    silent = [run for run in broken if run.error is None]
    hidden = [run for run in silent if run.hidden]
    why = (
        f"{len(silent):,} of {count(len(broken), 'run')} that break raise nothing: their caller gets "
        f"{listed(_answers(evidence, silent), most=4)} and no sign. "
        + (
            f"In {len(hidden):,} of them even the logits are finite, and only a look at the tensors tells. "
            if hidden
            else ""
        )
        + "A check of the logits finds the rest, before a token is printed."
    )
    return Claim(
        says="A deployed model should be checked for stability.",
        experiment="Of the runs that break: how many would be noticed without a check?",
        verdict=_judge(broken, holds=bool(silent)),
        why=why if broken else "No run has broken.",
        blocks=[bars("claims-noticed", "What is noticed of a break", tally(broken))] if broken else [],
    )


CLAIMS: Sequence[Callable[[Evidence], Claim]] = (
    _fixed_answer,
    _raises,
    _cause_float16,
    _cause_memory,
    _cause_length,
    partial(_cure, "float32"),
    partial(_cure, "bfloat16"),
    _cure_length,
    _card,
    _cpu,
    _check,
)


def _judge(evidence: Sequence[object], *, holds: bool) -> Verdict:
    """Open without evidence."""
    return _OPEN if not evidence else "holds" if holds else "does not hold"


def _key(outcome: Outcome) -> str:
    return repr(sorted((name, value) for name, value in outcome.case.settings.items() if name != "dtype"))


def _same(found: Iterable[Outcome], outcome: Outcome, dtype: str) -> Outcome | None:
    """The case that differs in its dtype and in how tokens are drawn, alone."""

    def key(o: Outcome) -> tuple[object, ...]:
        return tuple(o.case.settings[name] for name in ("prompt", "bos", "length"))

    return next((o for o in found if o.dtype == dtype and key(o) == key(outcome)), None)


def _answers(evidence: Evidence, runs: Sequence[Outcome]) -> list[str]:
    return [code(quoted(text or "?")) for text in dict.fromkeys(evidence.next_text(run) for run in runs)]


def _gigabytes(amount: float) -> str:
    """Decimal, as memory is sold."""
    return f"{amount / 1e9:.1f} GB"


def _break(things: Sequence[object]) -> str:
    return "breaks" if len(things) == 1 else "break"


def _among(never: Sequence[Text], longest: int) -> str:
    names = listed([text.name for text in never])
    return "" if not never else f", and {names} {'does' if len(never) == 1 else 'do'} not up to {longest:,}"


def _where(devices: Sequence[str]) -> str:
    return f", on {listed(list(dict.fromkeys(devices)))}" if devices else ""


def _reason(text: str | None) -> str:
    """An allocator's error without the numbers and places that differ from run to run."""
    text = text or "no message"
    return text if "allocate memory" not in text else "RuntimeError: ... can't allocate memory"


def _price(evidence: Evidence, dtype: str) -> str:
    errors = [
        header.logits_error
        for case, recording in evidence.results.runs()
        if (header := recording.header).dtype == dtype and header.logits_error is not None
    ]
    known = [error.kl_mean for error in errors if error.kl_mean is not None]
    same = [(error.top1 or 0.0) * error.compared for error in errors]
    compared = sum(error.compared for error in errors)
    if not known or not compared:
        return ""
    return (
        f" Its price is precision: against float32 the logits' mean KL divergence is up to {max(known):.2g} nats a "
        f"prompt, and the likeliest token is the same at {share(sum(same) / compared)} of "
        f"{count(compared, 'position')}."
    )


def _next_tokens(evidence: Evidence) -> Table:
    dtypes = list(dict.fromkeys(run.dtype for run in evidence.runs))
    rows: dict[tuple[str, bool | None], dict[str, str | None]] = {}
    for run in evidence.runs:
        text = evidence.next_text(run)
        key = str(run.case.settings["prompt"]).removeprefix("text: "), run.bos
        rows.setdefault(key, {})[run.dtype] = None if text is None else quoted(text)
    return Table(
        name="claims-next-token",
        title="The token that greedy decoding takes",
        columns=[Column("prompt"), Column("<bos>"), *(Column(dtype) for dtype in dtypes)],
        rows=[[*key, *(found.get(dtype) for dtype in dtypes)] for key, found in rows.items()],
    )
