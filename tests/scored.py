"""Rankings of remedies made by hand."""

from dataclasses import replace
from typing import Any

from stabilitykit.records.remedies import Change, Ranking, Score, Setting, Small
from stabilitykit.records.scaling import Factor, Scaling

DOWN = Factor(exponents=(-2,))
SCALING = Scaling(
    parameters={
        "embed_tokens.weight": DOWN, "layers.0.mlp.down_proj.weight": DOWN,
        "layers.1.mlp.down_proj.weight": Factor(exponents=(-2, 1), ends={0: (4, 8)}),
        "norm.weight": Factor(exponents=(2,), added=1.0),
    },
    settings={"rms_norm_eps": -4},
)  # fmt: skip
CHANGE = Change(
    moved=4, parameters=30, settings={"rms_norm_eps": Setting(before=1e-6, after=6.25e-8)}, gains_rounded={},
    before=Small(subnormal=10, zero=1), after=Small(subnormal=25, zero=3),
)  # fmt: skip
UNCHANGED: dict[str, Any] = {
    "scaling": Scaling(), "scaled_peak": 100.0, "peak": 100.0,
    "change": replace(CHANGE, moved=0, settings={}, after=CHANGE.before),
}  # fmt: skip


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
        checkpoint="toy", sha256="ab" * 32, notes=("dequantised",), command="stabilitykit repair toy", margin=1.0,
        peak=100_000.0, site="layers.1", scaled_peak=25_000.0, scaled_site="layers.1", scaling=SCALING, change=CHANGE,
        islands=("layers.1", "layers.1/add.0"), left_out={"clamp": "It has no layers."}, carried="scaling",
        scores=scores or (
            score("float32 residual", 1e-5, exportable=False), score("scaling", 2e-5, kl_max=5e-3),
            score("bfloat16", 1e-3, dtype="bfloat16"), score("float16", None),
        ),
        versions={"torch": "2.9"}, machine={"cores": 2},
    )  # fmt: skip
    return replace(made, **changes)
