"""The search for prompts that overflow: the vocabulary token by token, then short prompts from its worst tokens."""

from stabilitykit.searches.run import Options, search

__all__ = ["Options", "search"]
