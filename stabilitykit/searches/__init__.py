"""The search for prompts that overflow: the vocabulary token by token, then short prompts from its worst tokens."""

from stabilitykit.searches.run import search

__all__ = ["search"]
