"""The weights alone -> what no prompt can exceed, and how near hidden states and prompts come."""

from stabilitykit.bounds.bound import SiteBound, Verdict, bound_sites
from stabilitykit.bounds.examine import examine

__all__ = ["SiteBound", "Verdict", "bound_sites", "examine"]
