"""Sweeps made by hand: a plan, records and length maps small enough to know every number in them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stabilitykit.records import (
    Break,
    BreakKind,
    Deviation,
    FormatCounts,
    Header,
    LogitsError,
    Record,
    Recording,
    Softmax,
)
from stabilitykit.records.lengths import Check, LengthMap, Peak, Span
from stabilitykit.records.sweep import Case, Failure, Footprint, Memory, Plan, Results, Shortage

CAUSES = {2: "<bos>", 7: " a", 9: "."}


def run_case(dtype: str = "float16", **settings: Any) -> Case:
    return Case(kind="run", settings={"prompt": "prose", "length": 3, "bos": True, "dtype": dtype} | settings)


def lengths_case(dtype: str = "float16", **settings: Any) -> Case:
    return Case(kind="lengths", settings={"prompt": "prose", "length": "1..64", "bos": True, "dtype": dtype} | settings)


def memory_case(dtype: str = "float16", length: int = 128) -> Case:
    return Case(kind="memory", settings={"dtype": dtype, "length": length})


def plan(cases: Iterable[Case], **changes: Any) -> Plan:
    made = Plan(
        name="toy", title="A toy", command="stabilitykit sweep toy.toml", source='checkpoint = "toy"\n\n[axes]\n',
        checkpoint="toy", sha256="ab" * 32, config={"layers": 2}, notes=("dequantised", "toy terms"),
        cases=tuple(cases), sections=(), versions={"torch": "2.9"}, machine={"cores": 2},
    )  # fmt: skip
    return replace(made, **changes)


def sweep(
    folder: Path,
    results: Iterable[tuple[Case, Recording | LengthMap | Footprint | Shortage | Failure | None]],
    **changes: Any,
) -> Results:
    """A sweep's folder in which each case has its result, its failure, or nothing."""
    pairs = list(results)
    made = Results.create(folder, plan([case for case, _ in pairs], **changes))
    for case, result in pairs:
        if isinstance(result, Recording | LengthMap):
            result.save(made.path(case))
        elif isinstance(result, Footprint | Shortage):
            made.write(case, result)
        elif isinstance(result, Failure):
            made.write_failure(case, result)
    return Results.open(folder)


def header(dtype: str = "float16", **changes: Any) -> Header:
    made = Header(
        checkpoint="toy", sha256=None, dtype=dtype, device="cpu", level="operators", matmul="native",
        formats=("float16",), rows=1, tokens=((2, 7, 9),), token_texts=dict(CAUSES),
    )  # fmt: skip
    return replace(made, **changes)


def record(order: int, site: str, dtype: str = "float16", **changes: Any) -> Record:
    """A healthy record of 3 tokens and 4 channels, with changes."""
    layer = int(site.split(".")[1].split("/")[0]) if site.startswith("layers.") else None
    made = Record(
        order=order, step=0, site=site, label=None, module=site.partition("/")[0], operator="add", layer=layer,
        dtype=dtype, shape=(1, 3, 4), elements=12, masked=0, nan=0, positive_inf=0, negative_inf=0, zero=0,
        subnormal=0, amax=8.0, smallest=0.5, minimum=-8.0, maximum=1.0, mean=0.0, rms=1.0, exponent_first=-1,
        exponents=(11, 0, 0, 0, 1), formats={"float16": FormatCounts(0, 0, 0)}, amax_row=0, amax_position=1,
        amax_channel=2, amax_token=7, amax_token_text=" a", positions=3, channels=4,
    )  # fmt: skip
    return replace(made, **changes)


def broke(kind: BreakKind = "overflow", position: int = 0, **changes: Any) -> Break:
    made = Break(
        kind=kind, count=1, row=0, position=position, channel=2, token=2, index=(0, position, 2),
        operands=(60000.0, 8000.0), operand_sites=("layers.0/add.0", "layers.0.mlp.down_proj"), value=68000.0,
        limit=65504.0,
    )  # fmt: skip
    return replace(made, **changes)


def clean_run(dtype: str = "float16", amax: float = 16376.0, **changes: Any) -> Recording:
    records = [record(0, "layers.0", dtype), record(1, "layers.1", dtype, amax=amax), record(2, "lm_head", dtype)]
    return Recording(header(dtype, **changes), records)


def broken_run(dtype: str = "float16", kind: BreakKind = "overflow", **changes: Any) -> Recording:
    """Layer 0's residual breaks on <bos>; from layer 1 on everything is NaN, and sampling raises."""
    lost = {"nan": 12, "amax": None, "lost_positions": 3, "lost_channels": 4}
    first = broke(kind)
    records = [
        record(0, "layers.0/add.0", dtype, amax=60000.0),
        record(
            1, "layers.0", dtype, label="residual after MLP", positive_inf=1, amax=60000.0, lost_positions=1,
            lost_channels=1, broke=first,
        ),
        record(2, "layers.1", dtype, **lost),
        record(3, "lm_head", dtype, operator="matmul", **lost),
    ]  # fmt: skip
    return Recording(header(dtype, **{"error": "no `probabilities`", **changes}), records)


def peak(run: int, position: int, amax: float, site: str = "layers.0", order: int = 1) -> Peak:
    return Peak(run=run, order=order, site=site, label=None, layer=0, position=position, amax=amax)


def clean_map(
    dtype: str = "float16", longest: int = 64, amax: float = 8188.0, checks: tuple[Check, ...] = ()
) -> LengthMap:
    """Its peak is `amax` / 2 at first and `amax` from 5 tokens on."""
    peaks = (peak(longest, 0, amax / 2), peak(longest, 4, amax))
    return LengthMap(header(dtype), (Span(first=1, last=longest, run=longest),), peaks, checks)


def broken_map(dtype: str = "float16", first: int = 29, longest: int = 64, checks: tuple[Check, ...] = ()) -> LengthMap:
    """Clean up to `first` - 1 with a peak of 32,752, and then layer 1 breaks at the token '.'."""
    spans = [
        Span(
            first=first, last=longest, run=longest, site="layers.1", label="residual after MLP", layer=1,
            operator="add", order=2, token_text=".", broke=broke(position=first - 1, value=70000.0),
        )
    ]  # fmt: skip
    peaks = [peak(longest, 0, 32752.0)]
    if first > 1:
        spans.insert(0, Span(first=1, last=first - 1, run=first - 1))
        peaks.insert(0, peak(first - 1, 0, 32752.0))
    return LengthMap(header(dtype), tuple(spans), tuple(peaks), checks)


def check(length: int = 16, *, agrees: bool = True) -> Check:
    return Check(
        length=length, site=None, direct_site=None if agrees else "layers.1", ulp=1.0 if agrees else 9.0,
        ulp_site="layers.0", relative=1e-7, compared=2, agrees=agrees, peak_ulp=0.5 if agrees else 9.0,
        beyond=0 if agrees else 1,
    )  # fmt: skip


def memory(dtype: str = "float16", length: int = 128, *, measured: int = 1040, libraries: int = 300) -> Memory:
    return Memory(
        dtype=dtype, length=length, device="cpu", weights=800, cache=100, activations=100, libraries=libraries,
        peak=libraries + measured,
    )  # fmt: skip


def logits_error(kl_mean: float = 1e-3, top1: float = 0.9) -> LogitsError:
    return LogitsError(kl_mean=kl_mean, kl_max=10 * kl_mean, top1=top1, compared=3, positions=3)


def softmax(logit: float, heads: tuple[float, ...] = (1.0, 1.5)) -> Softmax:
    return Softmax(
        max_logit=logit, logit_range=9.0, entropy_min=(0.25, 0.5), entropy_mean=heads, max_probability=0.9,
        sum_error=1e-7, underflow_share=0.125, masked_rows=0, nan_rows=0,
    )  # fmt: skip


def deviation(sqnr: float) -> Deviation:
    return Deviation(sqnr=sqnr, largest=0.5, largest_ulp=2.0, compared=12)


def layered_run(dtype: str = "float16", scale: float = 1.0, **changes: Any) -> Recording:
    """Two layers of which no two sites agree: residual after MLP 200 and 201, after attention 100, 101, down 50, 51."""
    made = [record(0, "embed_tokens", dtype, label="embedding, scaled", operator="mul", amax=4.0 * scale)]
    for layer in (0, 1):
        sites: tuple[tuple[str, str, str, float, dict[str, Any]], ...] = (
            ("self_attn/softmax.0", "attention probabilities", "softmax", 0.9, {"softmax": softmax(10.0 + layer)}),
            ("/add.0", "residual after attention", "add", 100.0 + layer, {"deviation": deviation(60.0 - layer)}),
            ("mlp.down_proj", "down projection", "matmul", 50.0 + layer, {"deviation": deviation(40.0 - layer)}),
            ("", "residual after MLP", "add", 200.0 + layer, {"deviation": deviation(50.0 - layer)}),
        )
        for name, label, operator, amax, more in sites:
            site = f"layers.{layer}" + (f".{name}" if name[:1].isalpha() else name)
            size = amax if operator == "softmax" else amax * scale
            made.append(record(len(made), site, dtype, label=label, operator=operator, amax=size, **more))
    made.append(record(len(made), "lm_head", dtype, label="logits", operator="matmul", amax=20.0 * scale))
    return Recording(header(dtype, **changes), made)


def three_dtypes(folder: Path) -> Results:
    """One prompt in three dtypes, of which bfloat16 was compared with float32 and runs three times as high."""
    error = LogitsError(kl_mean=0.001, kl_max=0.02, top1=0.75, compared=4, positions=4)
    pairs = [
        (run_case(), layered_run()),
        (run_case("bfloat16"), layered_run("bfloat16", 3.0, logits_error=error)),
        (run_case("float32"), layered_run("float32")),
        (run_case(bos=False), broken_run()),
    ]
    return sweep(folder / "toy", pairs)
