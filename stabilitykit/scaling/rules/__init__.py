"""What each operator does to exponents: one rule for every kind of operator, with its algebra in its docstring.

A rule gets the operator's call and returns the exponents of its results: one shadow for all of them, a list with one
for each, or None where they have no scale. On the way it requires of its operands what has to hold for scaled operands
to give the scaled result, bit for bit. Results are of the form 2^e x with the x of the model as it was.
"""

from collections.abc import Callable, Mapping

from stabilitykit.scaling.call import Call
from stabilitykit.scaling.rules import attention, constants, fixed, moves, norms, products, sums
from stabilitykit.scaling.shadows import Shadow

Result = Shadow | list[Shadow] | None
Rule = Callable[[Call], Result]

RULES: Mapping[str, Rule] = {
    name: rule
    for part in (moves, sums, products, norms, attention, constants, fixed)
    for rule, names in part.RULES.items()
    for name in names.split()
}

# They make tensors of numbers, which may have a scale though nothing that they are given has one.
MAKES = frozenset(name for names in constants.RULES.values() for name in names.split())

# They place the values of one tensor and compute none; a view of a parameter that goes through them is still one.
MOVES = frozenset(moves.VIEWS.split())

# They cut a tensor into parts, which may then have scales of their own.
CUTS = frozenset("slice select split split_with_sizes unbind unsafe_split unsafe_split_with_sizes narrow chunk".split())
