"""Searches made by hand."""

from dataclasses import replace
from typing import Any

from stabilitykit.records.search import Find, KindPeaks, Scan, Search, Step, TokenPeak


def peak(token: int, text: str, value: float, **changes: Any) -> TokenPeak:
    made = TokenPeak(
        token=token, text=text, kind="word", is_text=True, value=value, headroom=1.0, site="layers.1",
        label="residual after MLP", layer=1,
    )  # fmt: skip
    return replace(made, **changes)


def find(*pieces: str, **changes: Any) -> Find:
    made = Find(
        tokens=tuple(range(len(pieces))), pieces=pieces, bos=False, text="".join(pieces), file="1.txt", value=70_000.0,
        headroom=-0.1, site="layers.1", label="residual after MLP", layer=1, position=1, breaks=True,
        broken_site="layers.1", broken_layer=1, broken_position=1, sentence="It overflows there.",
    )  # fmt: skip
    return replace(made, **changes)


def search(**changes: Any) -> Search:
    scan = Scan(
        name="alone", context=(), context_text="", scanned=100, dtype="bfloat16", checked=10, moved=0.02,
        bins=((-1, 1), (10, 99)), beyond=1, not_finite=0, sites=(("layers.1", 90), ("lm_head", 10)),
        kinds=(KindPeaks(kind="word", count=100, least=-0.1, median=3.0),),
        worst=(peak(7, "ow", 70_000.0, headroom=-0.1), peak(8, "**", 32_752.0)),
        by_ids=(peak(3, "<unused0>", 40_000.0, kind="unused", is_text=False, headroom=0.7),), seconds=1.0,
    )  # fmt: skip
    made = Search(
        checkpoint="toy", sha256="ab" * 32, notes=(), command="stabilitykit search toy", dtype="float16",
        vocabulary=100, bos=find("<bos>", bos=True, breaks=False, value=8188.0, headroom=3.0), scans=(scan,),
        steps=(Step(bos=False, length=1, tried=100, text="ow", value=70_000.0, headroom=-0.1),),
        finds=(find("ow", "ars"),), seconds=2.0, versions={"torch": "2.9"}, machine={"cores": 2},
    )  # fmt: skip
    return replace(made, **changes)
