"""Rankings of remedies made by hand."""

from dataclasses import replace
from typing import Any

from stabilitykit.records.remedies import Ranking, Score, Small


def score(name: str, kl_mean: float | None = 1e-3, **changes: Any) -> Score:
    finite = kl_mean is not None
    made = Score(
        name=name, summary=f"What {name} does.", dtype="float16", exportable=True, finite=finite, positions=1000,
        kl_mean=kl_mean, kl_interval=1e-5 if finite else None, kl_p99=2e-3 if finite else None,
        kl_max=4e-3 if finite else None, top1=0.99 if finite else None, perplexity=1e-4 if finite else None,
        headroom=1.5 if finite else None, weights=2**20, extra=0, time=1.0,
    )  # fmt: skip
    return replace(made, **changes)


def ranking(*scores: Score, **changes: Any) -> Ranking:
    made = Ranking(
        checkpoint="toy", sha256="ab" * 32, notes=("dequantised",), command="stabilitykit repair toy", gamma=0.25,
        margin=1.0, peak=100_000.0, site="layers.1", islands=("layers.1", "layers.1/add.0"), gains_rounded={},
        before=Small(subnormal=10, zero=1), after=Small(subnormal=25, zero=3), carried="rescale 2^-2",
        scores=scores or (
            score("float32 residual", 1e-5, exportable=False), score("rescale 2^-2", 2e-5, kl_max=5e-3),
            score("bfloat16", 1e-3, dtype="bfloat16"), score("float16", None),
        ),
        versions={"torch": "2.9"}, machine={"cores": 2},
    )  # fmt: skip
    return replace(made, **changes)
