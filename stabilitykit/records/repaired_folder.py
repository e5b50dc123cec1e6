"""What became of a folder whose weights were scaled: what was written, and what was compared with the original."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stabilitykit.records.scaling import Scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Of a tensor's numbers, how many the written ones do not give back exactly when the scaling is undone, and how many
    were written as subnormals, or as zero though they are not.
    """

    rounded: int = 0
    subnormal: int = 0
    zero: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFolder:
    """`sha256` of each file. `casts` of those tensors, by their names in the files, that did not come through whole.

    `scaled` tensors were multiplied, `unused` ones have no place in the model and are as they were. `left_out` files
    hold weights that the model is not loaded from, or leftovers, and were not carried along.
    """

    sha256: Mapping[str, str]
    dtype: str
    scaled: int
    casts: Mapping[str, Cast] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sets of numbers that should be equal, bit for bit: how many there are, how many differ, and by how much."""

    what: str
    numbers: int
    different: int
    largest: float

    @property
    def equal(self) -> bool:
        return self.different == 0
