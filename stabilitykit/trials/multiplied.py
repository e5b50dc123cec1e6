"""Parameters multiplied by powers of two: in words, and as lines of Python."""

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

from stabilitykit.records.scaling import Factor
from stabilitykit.words import listed


def told(parameters: Mapping[str, Factor], most: int) -> str:
    """By name and power, `most` of them; of a fused one the powers of its parts."""
    return listed([f"{name} by {_powers(one)}" for name, one in parameters.items()], most)


def lines(parameters: Mapping[str, Factor], model: str = "model") -> list[str]:
    """What multiplies them in place in the model of this name."""
    return [line for name, one in parameters.items() for line in _lines(f"{model}.get_parameter({name!r}).data", one)]


def _powers(factor: Factor) -> str:
    powers = listed([f"2^{one}" for one in dict.fromkeys(factor.exponents) if one])
    return f"{powers} in part" if factor.ends else powers


def _lines(held: str, factor: Factor) -> Iterator[str]:
    if not factor.ends:
        times = f"2.0**{factor.exponents[0]}"
        added = f"{factor.added:g}"
        yield f"{held}.add_({added}).mul_({times}).sub_({added})" if factor.added else f"{held} *= {times}"
        return
    ((dim, ends),) = factor.ends.items()
    sizes = [end - start for start, end in pairwise((0, *ends))]
    groups, before = _groups(sizes, factor.exponents), ":, " * dim
    if groups > 1:
        held, before = f"{held}.unflatten({dim}, ({groups}, -1))", f":, {before}"
    each = len(sizes) // groups
    starts = accumulate(sizes[:each], initial=0)
    for start, size, exponent in zip(starts, sizes[:each], factor.exponents[:each], strict=False):
        if exponent:
            yield f"{held}[{before}{start}:{start + size}] *= 2.0**{exponent}"


def _groups(sizes: list[int], exponents: tuple[int, ...]) -> int:
    """How many times the same blocks with the same powers follow on each other."""
    both = list(zip(sizes, exponents, strict=True))
    each = next(n for n in range(1, len(both) + 1) if both == both[:n] * (len(both) // n))
    return len(both) // each
