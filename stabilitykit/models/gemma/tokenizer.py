"""Text to token ids and back, by SentencePiece, from the vocabulary in the checkpoint."""

import re
from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor

from stabilitykit.checkpoints.checkpoint import Vocabulary
from stabilitykit.checkpoints.config import Generation
from stabilitykit.checkpoints.vocabulary import serialised
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.words import printable

_START, _END = "<start_of_turn>", "<end_of_turn>"


class Tokenizer:
    """Gemma's tokenizer: BPE with byte fallback, nothing added to the text and nothing normalised away.

    A literal `▁` in a text is a space to SentencePiece, and comes back as one.

    Raises CheckpointError for a vocabulary that SentencePiece refuses.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(serialised(vocabulary))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"A Gemma's vocabulary is one that SentencePiece can use; this one is not: {reason}. "
                "Fetch or convert the checkpoint again."
            ) from error
        self._controls = {
            piece: index
            for index, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
            if kind == "control" or index == vocabulary.unk
        }

    def encode(self, text: str, *, bos: bool = True, special_tokens: bool = False) -> list[int]:
        """The ids of `text`, after `<bos>` unless `bos` is False.

        Control tokens written in the text, such as `<bos>`, are ordinary text unless `special_tokens` is True.
        Raises MisuseError for a text that is not Unicode (lone surrogates).
        """
        ids = [self._vocabulary.bos] if bos else []
        if not special_tokens:
            return ids + self._plain(text)
        written = sorted((piece for piece in self._controls if piece in text), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, written))})", text) if written else [text]
        for part in parts:
            ids += [self._controls[part]] if part in self._controls else self._plain(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens have none, bytes that are not UTF-8 become `\\ufffd`.

        Raises MisuseError for an id outside the vocabulary.
        """
        for index in ids:
            self._check(index)
        return str(self._processor.decode(list(ids)))

    def piece(self, index: int) -> str:
        """A token as a table shows it: ` France`, `<bos>`, `<0xE2>`; a line's end is a backslash and an n.

        Raises MisuseError for an id outside the vocabulary.
        """
        self._check(index)
        return printable(self._vocabulary.pieces[index].replace("▁", " "))

    def chat(
        self,
        prompt: str,
        *,
        generation: Generation,
        system: str | None = None,
        earlier: Sequence[tuple[str, str]] = (),
        bos: bool = True,
        special_tokens: bool = False,
    ) -> list[int]:
        """The ids of a user's turn in Gemma's template, after `<bos>`, up to where the model's turn begins.

        `earlier` are turns before it: what the user said, and what the model answered.

        The prompt is plain text unless `special_tokens` is True: `<end_of_turn>` written in it ends nothing. White
        space around it goes, as in the released templates. Generation 3 reads `system` before the prompt, a blank line
        between them. Raises MisuseError for a system text in generations 1 and 2, which have no such role, and for a
        vocabulary without turns.
        """
        if system is not None and generation < 3:
            raise MisuseError(f"Gemma {generation} has no system role; a system text was given: put it in the prompt.")
        if _START not in self._controls or _END not in self._controls:
            raise MisuseError(f"A chat needs a vocabulary with {_START} and {_END}; this one lacks them. Use encode.")
        start, end = self._controls[_START], self._controls[_END]
        ids = [self._vocabulary.bos] if bos else []
        said = [turn.strip() for pair in earlier for turn in pair] + [prompt.strip()]
        if system is not None:
            said[0] = f"{system}\n\n{said[0]}"
        for number, turn in enumerate(said):
            role = "model" if number % 2 else "user"
            text = self.encode(f"{role}\n{turn}", bos=False, special_tokens=special_tokens)
            ids += [start, *text, end, *self._plain("\n")]
        return [*ids, start, *self._plain("model\n")]

    def _plain(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._processor.encode(text.encode())
        except UnicodeEncodeError as error:
            raise MisuseError(
                f"A text is Unicode; this one has a lone surrogate at character {error.start}. "
                "Decode the bytes it came from with errors='replace'."
            ) from error
        return ids

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self._vocabulary.pieces):
            raise MisuseError(f"A token id is from 0 to {len(self._vocabulary.pieces) - 1}; {index} is not.")
