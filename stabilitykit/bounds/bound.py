"""From a decoder's weights alone to a bound on every tensor that a run stores, site by site."""

import math
import re
from collections.abc import Callable, Iterable

import torch

from stabilitykit.bounds.arithmetic import Arithmetic, outward
from stabilitykit.bounds.recipe import Decoder, of_gemma
from stabilitykit.bounds.walk import Walk
from stabilitykit.bounds.weights import Bound, LayerMatrices
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.formats import number_format
from stabilitykit.models.devices import parse_dtype
from stabilitykit.recorder.labels import FAMILIES, label
from stabilitykit.records.bounds import SiteBound
from stabilitykit.run.case import Progress


def bound_sites(
    decoder: Decoder | Checkpoint,
    dtype: str | torch.dtype = "float16",
    *,
    witnesses: Callable[[int, LayerMatrices], None] | None = None,
    progress: Progress | None = None,
) -> list[SiteBound]:
    """A bound on every site that the recorder sees in a run of this decoder in `dtype`, in order of execution.

    The bounds hold for the kit's own model of a Checkpoint, and for transformers' eager one of another decoder, in the
    arithmetic that `stabilitykit.bounds.arithmetic` states, rounding included, for any prompt within its context. What
    norms compute internally in float32 is left out. At most a few float64 copies of one layer's matrices are in memory
    at a time. `witnesses` is called with the index and the matrices of each layer. Raises MisuseError for a dtype that
    no model runs in, and for weights that are not finite in it; CheckpointError for weights that are missing.
    """
    form = number_format(str(parse_dtype(dtype)))
    if isinstance(decoder, Checkpoint):
        decoder = of_gemma(decoder)
    recipe, walk = decoder.recipe, Walk(decoder, parse_dtype(dtype), Arithmetic.of(form))
    family = FAMILIES[recipe.family.removesuffix("_text")]
    found: dict[str, SiteBound] = {}

    def keep(sites: Iterable[Bound]) -> None:
        for site, bound in sites:
            number = re.match(r"layers\.(\d+)", site)
            layer = int(number[1]) if number else None
            largest = math.inf if isinstance(bound, str) else float(outward(bound.max()))
            named: str | None = label(site, family)
            if site in found:  # two operators of one name: the head's, and what makes the layers' own inputs
                largest, named = max(largest, found[site].bound), None
            elif layer is not None and recipe.attention[layer].source != layer and "/" in site:
                named = None  # operators are numbered otherwise where no key is turned
            found[site] = SiteBound(
                site=site,
                label=named,
                layer=layer,
                dtype=form.name,
                bound=largest,
                unbounded=bound if isinstance(bound, str) else None,
            )

    keep(walk.embedding())
    for index in range(recipe.layers):
        if progress is not None:
            progress("bounding layers", index, recipe.layers)
        matrices = walk.read(index)
        keep(walk.layer(matrices))
        if witnesses is not None:
            witnesses(index, matrices)
    if progress is not None:
        progress("bounding layers", recipe.layers, recipe.layers)
    keep(walk.head())
    return list(found.values())
