"""The search for prompts that break: the vocabulary, token by token, and short prompts out of its worst tokens."""

from stabilitykit.searches.run import Options, search

__all__ = ["Options", "search"]
