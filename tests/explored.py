"""A sweep small enough to know every number in it, with names that would be markup."""

import dataclasses
from pathlib import Path
from typing import Any

from swept import (
    broke,
    broken_map,
    clean_map,
    deviation,
    header,
    lengths_case,
    record,
    run_case,
    softmax,
    sweep,
)  # fmt: skip

from stabilitykit.records import FormatCounts, Record, Recording
from stabilitykit.records.sweep import Results

HOSTILE = 'layers.1/</script><img src=x onerror="document.title=1">{{ 7 * 7 }}'
TOKENS = {2: "<bos>", 7: "</script><b>", 9: "it's"}


def sized(order: int, site: str, dtype: str, peaks: tuple[float, ...], **changes: Any) -> Record:
    """A record with its magnitudes at each of 3 positions, and all that follows from them."""
    amax = max(peaks)
    at = peaks.index(amax)
    counts = {name: FormatCounts(int(amax > 65504), 2, 3) for name in ("float16", "bfloat16")}
    return record(
        order, site, dtype, amax=amax, maximum=amax, minimum=-amax / 2, position_amax=peaks, amax_position=at,
        amax_token=(2, 7, 9)[at], amax_token_text=TOKENS[(2, 7, 9)[at]], formats=counts, stored_dtype="float16",
        **changes,
    )  # fmt: skip


def toy_run(dtype: str, scale: float = 1.0, **changes: Any) -> Recording:
    """Two layers; layer 1's residual is past float16's maximum, where float16 breaks, and the logits are lost."""
    breaks = dtype == "float16"
    compared = None if dtype == "float32" else deviation(46.25)
    lost = {"nan": 12, "amax": None, "minimum": None, "maximum": None, "lost_positions": 3, "lost_channels": 4}
    records = [
        sized(0, "embed_tokens", dtype, (4.0, 2.0, 1.0), label="embedding, scaled"),
        sized(1, "layers.0/softmax.0", dtype, (0.9, 0.5, 0.25), label="attention probabilities", softmax=softmax(10.5)),
        sized(2, "layers.0", dtype, (200.0 * scale, 100.0, 50.0), label="residual after MLP", deviation=compared),
        dataclasses.replace(
            record(3, "layers.1.norm/pow.0", "float32", amax=1e9, maximum=1e9), stored_dtype="float32", label=None
        ),
        sized(4, HOSTILE, dtype, (30.0, 60.0, 15.0)),
        sized(
            5, "layers.1", dtype, (60000.0 if breaks else 68000.0, 30000.0, 9000.0), label="residual after MLP",
            deviation=compared,
            **({"positive_inf": 1, "lost_positions": 1, "lost_channels": 1, "broke": broke()} if breaks else {}),
        ),
        record(6, "lm_head", dtype, label="logits", **lost)
        if breaks
        else sized(6, "lm_head", dtype, (20.0, 21.0, 22.0), label="logits"),
    ]  # fmt: skip
    more = {"formats": ("float16", "bfloat16"), "token_texts": TOKENS, "starts": (0,)} | changes
    return Recording(header(dtype, **more), records)


def toy_sweep(folder: Path, **changes: Any) -> Results:
    return sweep(
        folder / "toy",
        [
            (run_case("float32"), toy_run("float32", **changes)),
            (run_case("float16"), toy_run("float16", **changes)),
            (run_case("bfloat16"), toy_run("bfloat16", 1.5, **changes)),
            (lengths_case(), broken_map()),
            (lengths_case("float32"), clean_map("float32")),
        ],
    )
