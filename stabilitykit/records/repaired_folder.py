"""What became of a folder whose weights were scaled: what was written, and what was compared with the original."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stabilitykit.records.scaling import Scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Of a tensor's numbers, how many the written ones do not give back exactly when the scaling is undone, and how
    many were written as subnormals, or as zero though they are not.
    """

    rounded: int = 0
    subnormal: int = 0
    zero: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFolder:
    """`sha256` of each file. `casts` of those tensors, by their names in the files, that did not come through whole.

    `scaled` tensors were multiplied, `unused` ones have no place in the model and are as they were. `left_out` files
    were not carried along: weights that the model is not loaded from, and what an earlier repair says.
    """

    sha256: Mapping[str, str]
    dtype: str
    scaled: int
    casts: Mapping[str, Cast] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sets of numbers that should be equal, bit for bit: how many there are, how many differ, and by how much.

    NaN differs from everything, and by NaN. A difference may be `excused` by gains that float32 had to round.
    """

    what: str
    numbers: int
    different: int
    largest: float
    excused: bool = False

    @property
    def equal(self) -> bool:
        return self.different == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Float32 outputs that are kept to be compared with later: the SHA-256 of their bits, and at `places` among them,
    counted in row-major order, their `values`.
    """

    what: str
    sha256: str
    places: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Float16:
    """A run in float16: whether all it puts out is `finite`, and if so its largest difference from float32 (`error`).

    `failure` says why it does not run in float16 at all.
    """

    finite: bool
    error: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderCheck:
    """A written folder, loaded again by plain transformers and run on `prompts` of token ids.

    `comparisons` are of numbers that should be equal bit for bit, `float16` is the folder's own run. `gains_rounded`
    counts gains c + w that float32 had to round, which excuse a difference, and so does an `approximate` scaling.
    `kept` are the outputs of the folder with its scaling undone, or as it is where weights are quantised. `not_run` are
    scaled parameters of modules that none of the runs reached. Without the original (`original_seen`) the comparisons
    are with the folder undone and with what was kept.
    """

    prompts: tuple[tuple[int, ...], ...]
    comparisons: tuple[Comparison, ...]
    float16: Float16
    gains_rounded: int
    approximate: bool = False
    kept: tuple[Kept, ...] = ()
    not_run: tuple[str, ...] = ()
    original_seen: bool = True

    @property
    def equal(self) -> bool:
        return all(one.equal for one in self.comparisons)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in sentences; none where everything is as it should be."""
        found = [
            f"{one.what}: {one.different:,} of {one.numbers:,} numbers differ, by up to {one.largest:.3g}"
            for one in self.comparisons
            if not one.equal and not ((self.gains_rounded or self.approximate) and one.excused)
        ]
        if self.float16.failure is not None:
            return (*found, self.float16.failure)
        return (*found, *(() if self.float16.finite else ("in float16 it is not finite",)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairedFolder:
    """All that is known of a folder that holds the model of `source`, scaled, and what is needed to check it again.

    `source_sha256` are the digests of the original's files of weights by name. `kind` is the class of transformers'
    whose parameters `scaling` names, None for the one that the config names.
    """

    source: str
    source_sha256: Mapping[str, str]
    scaling: Scaling
    written: WrittenFolder
    check: FolderCheck
    kind: str | None = None
