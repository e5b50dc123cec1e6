"""The search: the vocabulary in three contexts, then short prompts out of its worst tokens, all of it confirmed."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.choices import LowDtype, check_choice
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.models.devices import parse_device
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.machine import provenance_of
from stabilitykit.models.transformers import HuggingFaceFolder
from stabilitykit.records.search import Find, Search, Step
from stabilitykit.run.case import Progress, stage
from stabilitykit.run.inputs import Tensors, read_prompts, reader
from stabilitykit.run.prompts import parse_prompt
from stabilitykit.run.prompts import tokens as prompt_tokens
from stabilitykit.run.source import opened_by
from stabilitykit.searches.confirm import confirm, finite, headroom
from stabilitykit.searches.extend import Grown, extend
from stabilitykit.searches.given import TRIED, GivenPrompts
from stabilitykit.searches.kinds import kind_of
from stabilitykit.searches.scan import Count, Peak
from stabilitykit.searches.searched import Searched, searched
from stabilitykit.searches.text import text_of
from stabilitykit.searches.vocabulary import Scanned, VocabularyScanner

ALONE, AFTER_BOS, INSIDE = "alone", "after <bos>", "inside a text"
CONTEXT = 8  # tokens of the kit's prose before the one that is scanned inside a text

STARTS = 32  # tokens with which prompts begin
CANDIDATES = 256  # tokens by which they grow
FINDS = 3  # with <bos>, and without
_PATIENCE = 2  # lengths without a smaller headroom after which a prompt is no longer drawn out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What `search` was asked for."""

    dtype: str
    bos: bool | None
    limit: int | None
    beam: int
    length: int
    device: str


def search(
    checkpoint: str | Path | Checkpoint | HuggingFaceFolder,
    *,
    dtype: LowDtype = "float16",
    bos: bool | None = None,
    limit: int | None = None,
    beam: int = 8,
    length: int = 12,
    sieve: str | None = None,
    prompts: Sequence[str | Path] = (),
    device: str = "cpu",
    command: str | None = None,
    progress: Progress | None = None,
) -> Search:
    """Looks for the shortest prompt that overflows, or comes nearest to it, and for the most dangerous tokens.

    Each token of the vocabulary is scanned alone, after <bos> and inside a text. The worst ones are then put together,
    one more at a time, until a prompt overflows. Every prompt that is said to overflow was run in `dtype`.

    Args:
        checkpoint: what `open_checkpoint` takes or returned; `hf:FOLDER` or `hf:NAME` for whatever transformers loads
            and reads texts. What the kit's own model does not run is searched more slowly: each candidate is a row of
            tokens of its own.
        dtype: to search for overflows in: float16 or bfloat16.
        bos: True for prompts with <bos> only, or whatever else the tokenizer puts around a text; False for those
            without; None for both, or without only where <bos> alone overflows.
        limit: scan the first so many entries of the vocabulary; None for all.
        beam: prompts kept and extended at each length.
        length: of the longest prompt, in tokens, <bos> not counted.
        sieve: the dtype of the first look at every token, of the kit's own model; None for the fastest that is good
            enough.
        prompts: files of texts and chats, or folders of them, to bring to overflow: shortened from both ends where they
            do; else put together in both orders, and with tokens replaced by worse ones where their values are largest.
        device: cpu, cuda or mps.
        command: the command line to name in the result, if there was one.
        progress: called with (what is being done, how much of it is done, out of how much).

    Returns:
        A Search: `breaking` are the prompts that overflowed, the shortest first; `finds` the nearest ones with their
        headroom in bits; `scans` the worst tokens.

    Raises:
        MisuseError: for an unknown dtype or device, a limit, beam or length below 1, a length beyond the context.
        CheckpointError: for a checkpoint that is damaged, or that transformers cannot load.

    >>> tiny = "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&head_dim=8&vocabulary=512&context=32"
    >>> found = search(tiny, bos=False, limit=300, length=1)
    >>> found.breaking, [scan.name for scan in found.scans]
    ((), ['alone', 'inside a text'])
    >>> found.finds[0].headroom > 8  # bits
    True
    """
    began = time.monotonic()
    check_choice("dtype", dtype, get_args(LowDtype))
    for name, value in (("limit", limit), ("beam", beam), ("length", length)):
        if value is not None and value < 1:
            raise MisuseError(f"{name} must be at least 1, got {value}.")
    opened = opened_by(checkpoint, progress)
    options = _Options(
        dtype=dtype,
        bos=bos,
        limit=limit,
        beam=beam,
        length=length,
        device=str(parse_device(device)),
    )
    models = searched(opened, dtype, sieve, options.device, progress)
    if bos is None and not models.begin:
        bos = False  # the tokenizer puts nothing before a text
    _check(models, options)
    given = _read(prompts, models, opened, bos=bos is not False)
    run = _Run(models, options, progress)
    alone = run.bos_alone()
    scans = {name: run.scan(name) for name in _contexts(bos)}
    steps: list[Step] = []
    finds: list[Find] = []
    for with_bos in _choices(bos, alone):
        more, found = run.grow(with_bos, scans)
        steps += more
        finds += found
    return Search(
        dtype=dtype,
        vocabulary=len(models.vocabulary.pieces),
        bos=alone,
        scans=tuple(one.scan for one in scans.values()),
        steps=tuple(steps),
        finds=_numbered(finds, 0),
        given=_numbered(run.given(given, scans), len(finds)),
        seconds=time.monotonic() - began,
        **provenance_of(opened, command, options.device),
    )


def _numbered(finds: Sequence[Find], before: int) -> tuple[Find, ...]:
    return tuple(replace(find, file=f"{number}.txt") for number, find in enumerate(finds, start=before + 1))


def _read(
    places: Sequence[str | Path], models: Searched, opened: Checkpoint | HuggingFaceFolder, *, bos: bool
) -> list[list[int]]:
    """The tokens of texts and chats in files. Raises MisuseError for tensors, and for what does not fit the model."""
    if isinstance(opened, Checkpoint):
        own = Tokenizer(opened.vocabulary)
        read = reader(own.encode, partial(own.chat, generation=opened.config.generation), bos=bos)
    else:
        read = reader(opened.tokenizer.encode, opened.tokenizer.chat, bos=bos)
    found = []
    for one in read_prompts([Path(place) for place in places]):
        if isinstance(one, Tensors):
            raise MisuseError(
                f"{one.name} holds tensors, and a search looks for prompts of tokens; give it texts or chats."
            )
        tokens = read(one.asked)
        if not 0 < len(tokens) <= models.context:
            raise MisuseError(
                f"{one.name} has {len(tokens):,} tokens, and the model's context holds {models.context:,}."
            )
        found.append(tokens)
    return found


def _contexts(bos: bool | None) -> list[str]:
    return {None: [ALONE, AFTER_BOS, INSIDE], True: [AFTER_BOS], False: [ALONE, INSIDE]}[bos]


def _choices(bos: bool | None, alone: Find | None) -> list[bool]:
    if bos is not None:
        return [] if bos and alone is not None and alone.breaks else [bos]
    return [False] if alone is not None and alone.breaks else [False, True]


def _check(models: Searched, options: _Options) -> None:
    if options.bos and not models.begin:
        raise MisuseError(
            f"{models.low.source}: its tokenizer puts nothing before a text, so that there is no prompt with <bos>; "
            "leave out --bos."
        )
    longest = models.context - max(1, len(models.recorder.closed(models.begin)))
    if options.length > longest:
        raise MisuseError(
            f"length must be at most {longest:,}, so that prompts fit the model's context; got {options.length:,}."
        )


class _Run:
    """The models of one search, and its steps."""

    def __init__(self, models: Searched, options: _Options, progress: Progress | None) -> None:
        self.options = options
        self.progress = progress
        self.models = models
        self.vocabulary, self.tokenizer = models.vocabulary, models.tokenizer
        self.form = number_format(options.dtype)
        self.scanner = VocabularyScanner(
            models.sieve, models.wide, models.recorder, self.vocabulary, self.tokenizer, models.begin, options.dtype
        )
        weights = models.low.module.parameters()
        self.always = not all(bool(one.isfinite().all()) for one in weights)  # then any prompt may break
        size = len(self.vocabulary.pieces)
        self.limit = size if options.limit is None else min(size, options.limit)
        prose = parse_prompt("prose", Path())
        text = prompt_tokens(prose, self.tokenizer, bos=False, length=min(CONTEXT, models.context - 1))
        self.contexts = {ALONE: [], AFTER_BOS: list(models.begin), INSIDE: text}

    def bos_alone(self) -> Find | None:
        """What `<bos>` comes to by itself, and so in every prompt that begins with it."""
        if self.options.bos is False or not self.models.begin:
            return None
        return confirm(
            self.models.recorder, self.models.low, self.models.recorder.closed(self.models.begin), bos=True, text=None
        )

    def scan(self, name: str) -> Scanned:
        return self.scanner.scan(name, self.contexts[name], self.limit, self.progress)

    def given(self, prompts: Sequence[Sequence[int]], scanned: dict[str, Scanned]) -> list[Find]:
        """What becomes of the prompts that were given, with the worst tokens of all scans."""
        if not prompts:
            return []
        worst = self._by_turns(scanned.values(), TRIED)
        return GivenPrompts(self.models, worst, stage("prompts that were given", self.progress)).finds(prompts)

    def grow(self, bos: bool, scanned: dict[str, Scanned]) -> tuple[list[Step], list[Find]]:
        """The prompts that break at the least length at which one does; else the nearest of any length."""
        before = list(self.models.begin) if bos else []
        alone = scanned[AFTER_BOS if bos else ALONE]
        held = self.models.recorder.peaks(before) if before else []

        def is_prompt(tokens: Sequence[int]) -> bool:
            return text_of(self.tokenizer, tokens[len(before) :]) is not None

        starts = [
            Grown((*before, token), peak, max([peak, *held], key=_value))
            for token, peak in ((token, alone.peaks[token]) for token in self._by_turns([alone], STARTS))
        ]
        candidates = self._by_turns(scanned.values(), CANDIDATES)
        steps: list[Step] = []
        seen: list[Grown] = []
        kept: list[Grown] = []
        without_gain = 0
        for level in extend(
            self.models.wide,
            starts,
            candidates,
            beam=self.options.beam,
            length=self.options.length + len(before),
            is_prompt=is_prompt,
            progress=self._counter,
        ):
            best = max(level, key=lambda one: one.newest.value)
            without_gain = 0 if not seen or best.newest.value > max(map(_newest, seen)) else without_gain + 1
            seen += level
            tried = len(candidates) * len(kept) if kept else self.limit
            steps.append(self._step(bos, best, len(before), tried))
            kept = level
            broken = list(self._broken(level, bos, len(before)))
            if broken:
                return steps, broken
            if without_gain == _PATIENCE:
                break
        nearest = sorted(seen, key=lambda one: (-one.newest.value, len(one.tokens)))[:FINDS]
        return steps, [self._confirm(one, bos, len(before)) for one in nearest]

    def _broken(self, level: Sequence[Grown], bos: bool, before: int) -> Iterator[Find]:
        """Of prompts of one length that should break, the first few that do."""
        found = 0
        for one in level:
            if found < FINDS and (self.always or self.form.overflows(one.largest.value)):
                find = self._confirm(one, bos, before)
                found += find.breaks
                if find.breaks:
                    yield find

    def _confirm(self, one: Grown, bos: bool, before: int) -> Find:
        text = text_of(self.tokenizer, one.tokens[before:])
        return confirm(
            self.models.recorder, self.models.low, self.models.recorder.closed(one.tokens), bos=bos, text=text
        )

    def _by_turns(self, scanned: Iterable[Scanned], amount: int) -> list[int]:
        """Tokens that are text by themselves: by turns the worst of each context of every kind, and in every site.

        What is largest alone need not be what grows: the largest values of a text stand in other layers than those of
        most tokens, on newlines and punctuation rather than on words.
        """
        queues: dict[tuple[str, str], list[int]] = {}
        for one in scanned:
            for token in sorted(range(self.limit), key=_falling(one.peaks)):
                for group in (kind_of(self.vocabulary, token), one.peaks[token].place.site):
                    queues.setdefault((one.scan.name, group), []).append(token)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*queues.values()))
        known = dict.fromkeys(token for token in turns if token is not None)
        written = (token for token in known if text_of(self.tokenizer, [token]) is not None)
        return list(itertools.islice(written, amount))

    def _step(self, bos: bool, best: Grown, before: int, tried: int) -> Step:
        return Step(
            bos=bos,
            length=len(best.tokens),
            tried=tried,
            text=text_of(self.tokenizer, best.tokens[before:]) or "",
            value=finite(best.newest.value),
            headroom=headroom(best.newest.value, self.options.dtype),
        )

    def _counter(self, length: int) -> Count:
        def count(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"prompts of {length} tokens", done, total)

        return count


def _falling(peaks: Sequence[Peak]) -> Callable[[int], float]:
    return lambda token: -peaks[token].value


def _value(peak: Peak) -> float:
    return peak.value


def _newest(one: Grown) -> float:
    return one.newest.value
