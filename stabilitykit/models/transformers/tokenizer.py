"""A checkpoint's own tokenizer, as transformers reads it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.transformers.backend import PREFIX, explained, imported, quiet
from stabilitykit.words import printable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""The files that hold a tokenizer's tokens, of which a folder with one has at least one."""


@dataclass(frozen=True, slots=True)
class HuggingFaceTokenizer:
    """A checkpoint's own tokenizer, with the three things that a prompt needs."""

    tokenizer: Any
    source: str

    def encode(self, text: str, *, bos: bool = True, special_tokens: bool = False) -> list[int]:
        """The tokenizer's ids; `bos` adds what the tokenizer puts around a text, `special_tokens` reads them in it."""
        how = {"add_special_tokens": bos, "split_special_tokens": not special_tokens}
        ids = self.tokenizer(text, **how, verbose=False)["input_ids"]  # else long texts get a warning: most are cut
        return [int(token) for token in ids]

    def chat(
        self,
        text: str,
        *,
        system: str | None = None,
        earlier: Sequence[tuple[str, str]] = (),
        bos: bool = True,
        special_tokens: bool = False,
    ) -> list[int]:
        """One turn in the tokenizer's own chat template, up to where the answer begins; without `bos` less its first
        token, where that is `<bos>`. `earlier` are turns before it: what the user said, and what the model answered.
        `special_tokens` reads control tokens in the text; else only the template's are.

        Raises MisuseError for a tokenizer without a template, for a template that refuses the turn, and for control
        tokens in the text where they cannot be told from the template's.
        """
        if not self.tokenizer.chat_template:
            raise MisuseError(
                f"The tokenizer of {self.source} has no chat template, so it reads texts and no chats; leave out "
                "--chat."
            )
        said = [*(turn for pair in earlier for turn in pair), text]
        roles = ["assistant" if number % 2 else "user" for number in range(len(said))]
        if system is not None:
            said, roles = [system, *said], ["system", *roles]
        controls = self._controls()
        written = [] if special_tokens else [token for token in controls if any(token in part for part in said)]
        # what is written in the text stands behind a character of private use while the template is filled in
        unused = (mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if not any(mark in part for part in said))
        hidden = dict(zip(written, unused, strict=False))
        turns = [{"role": role, "content": _replaced(part, hidden)} for role, part in zip(roles, said, strict=True)]
        try:
            filled = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # jinja's, raised by the template itself
            raise MisuseError(f"The chat template of {self.source} refuses this prompt: {error}.") from error
        ids = self.encode(filled, bos=False, special_tokens=True)
        if hidden:
            parts = re.split(f"({'|'.join(map(re.escape, controls))})", filled)
            if self._joined(parts, {}) != ids:
                raise MisuseError(
                    f"Around {written[0]} in the prompt, the tokenizer of {self.source} cannot tell its template's "
                    "tokens from text; leave it out, or add --special-tokens if the token is meant."
                )
            ids = self._joined(parts, {mark: token for token, mark in hidden.items()})
        starts = not bos and ids[:1] == [self.tokenizer.bos_token_id]
        return ids[starts:]

    def _controls(self) -> list[str]:
        """The special tokens as they are written, the longer before what they begin with."""
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted((str(token.content) for token in added if token.special), key=len, reverse=True)

    def _joined(self, parts: Sequence[str], marks: Mapping[str, str]) -> list[int]:
        """The ids of text and control tokens by turns, with `marks` in the text replaced."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(part)))
            else:
                ids += self.encode(_replaced(part, marks), bos=False)
        return ids

    def piece(self, token: int) -> str:
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:
            return f"<row {token}>"
        if "\u2581" in text:  # SentencePiece's mark for a space
            text = text.replace("\u2581", " ")
        elif token not in self.tokenizer.all_special_ids:
            decoded = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if decoded and "\ufffd" not in decoded:  # else a part of a character, which its own name tells
                text = decoded
        return printable(str(text))

    @property
    def begins(self) -> bool:
        """Whether a text begins with `<bos>` unless that is left out."""
        return self.encode("a")[:1] == [self.tokenizer.bos_token_id]

    @property
    def pad(self) -> int:
        """The id that stands for padding, `<eos>` where there is none of its own, as is transformers' habit."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in known if token is not None), 0)


def open_tokenizer(name: str, *, trust_remote_code: bool = False) -> HuggingFaceTokenizer:
    """The tokenizer in the folder `name`, or of that name in the local cache.

    Code in the folder runs only with `trust_remote_code`. Raises as `open_model` does.
    """
    folder = local_folder(name)
    transformers = imported()
    with quiet(transformers), explained(name):
        loaded = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    if len(loaded) <= len(loaded.all_special_ids):  # transformers makes up an empty one where there is no file
        raise CheckpointError(
            f"{folder} has no tokenizer.json or tokenizer.model that holds tokens. Copy it there from where the "
            "weights came from."
        )
    return HuggingFaceTokenizer(loaded, f"{PREFIX}{name}")


def _replaced(text: str, by: Mapping[str, str]) -> str:
    for old, new in by.items():
        text = text.replace(old, new)
    return text
