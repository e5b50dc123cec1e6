"""From the weights alone to bounds that no prompt can exceed, and how close hidden states and prompts come."""

from stabilitykit.bounds.bound import bound_sites
from stabilitykit.bounds.examine import examine

__all__ = ["bound_sites", "examine"]
