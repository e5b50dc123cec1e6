"""The category of a token, from its piece."""

import unicodedata

from stabilitykit.checkpoints.checkpoint import Vocabulary


def kind_of(vocabulary: Vocabulary, token: int) -> str:
    """One of `stabilitykit.records.search.KINDS`. A space before a word or a sign belongs to it."""
    known = vocabulary.types[token]
    piece = vocabulary.pieces[token].replace("▁", " ")
    if known == "unused" or piece.startswith("<unused"):
        return "unused"
    if known in ("control", "unknown"):
        return "control"
    if known == "byte":
        return "byte"
    if not piece.strip(" \t"):
        return "space"
    if not piece.strip():
        return "newline"
    return _of_signs(piece.strip(" "))


def _of_signs(text: str) -> str:
    classes = {unicodedata.category(sign)[0] for sign in text}
    if classes <= {"P", "S"}:
        return "punctuation"
    if classes <= {"N"}:
        return "digit"
    return "word" if classes <= {"L", "M"} else "other"
