"""Bounds made by hand, of two layers."""

import math
from dataclasses import replace
from typing import Any

from stabilitykit.records.bounds import Bounds, SiteBound


def site(name: str, bound: float, **changes: Any) -> SiteBound:
    layer = int(name.split(".")[1].split("/")[0]) if name.startswith("layers.") else None
    made = SiteBound(site=name, label=name.rpartition(".")[2], layer=layer, dtype="float16", bound=bound)
    return replace(made, **changes)


SITES = (
    site("embed_tokens", 20.0, label="embedding, scaled", observed=19.0),
    site("layers.0.mlp.down_proj", 70_000.0, label="down projection", found=66_000.0, observed=10.0),
    site("layers.0", 60_000.0, label="residual after MLP", observed=50_000.0),
    site("layers.1.mlp.down_proj", 80_000.0, label="down projection", found=60_000.0, observed=20.0),
    site("layers.1", 130_000.0, label="residual after MLP", observed=66_000.0),
    site("lm_head", math.inf, label="logits"),
)


def bounds(**changes: Any) -> Bounds:
    made = Bounds(
        checkpoint="toy", sha256="ab" * 32, notes=("dequantised",), command="stabilitykit bound toy", dtype="float16",
        sites=SITES, versions={"torch": "2.9"}, machine={"cores": 2},
    )  # fmt: skip
    return replace(made, **changes)
