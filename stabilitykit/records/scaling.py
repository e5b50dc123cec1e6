"""A scaling: the powers of two that multiply a model's parameters and settings, so that it computes the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What multiplies a tensor: 2^e, with an e of its own for every block.

    `ends` says, by dimension, where the blocks along it end; a dimension that it does not name is one block.
    `exponents` are those of the blocks in row-major order, one where there are no `ends`. With `added` = c the tensor w
    stands for a gain c + w, and the gain is what is multiplied: w becomes 2^e (c + w) - c.
    """

    exponents: tuple[int, ...]
    ends: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    added: float = 0.0

    @property
    def inverse(self) -> "Factor":
        """What takes it back."""
        return replace(self, exponents=tuple(-exponent for exponent in self.exponents))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """`parameters`: by the model's own name, parameters and persistent buffers that change. `settings`: by the keys
    that lead to it in the config, joined by dots, the exponent of a setting that changes (an eps, a scale of scores).
    """

    parameters: Mapping[str, Factor] = field(default_factory=dict)
    settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def inverse(self) -> "Scaling":
        """What takes it back: exactly, but for gains c + w that were rounded."""
        return Scaling(
            parameters={name: factor.inverse for name, factor in self.parameters.items()},
            settings={key: -exponent for key, exponent in self.settings.items()},
        )


UNCHANGED = Scaling()
