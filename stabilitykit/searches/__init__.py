"""The search for prompts that break: the vocabulary, token by token, and short prompts out of its worst tokens."""

from stabilitykit.searches.run import search

__all__ = ["search"]
