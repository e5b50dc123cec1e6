"""Every claim is judged by the sweep's own cases: evidence turned around turns the verdict around, and none leaves it
open."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from swept import broken_map, broken_run, clean_map, clean_run, lengths_case, memory, run_case, sweep

from stabilitykit.records.sweep import Case, Footprint, Results, Shortage
from stabilitykit.report.blocks import Figure, Table
from stabilitykit.report.figures import draw
from stabilitykit.report.own_section import load
from stabilitykit.sweeps.file import read_experiment

CLAIMS = Path(__file__).parents[2] / "experiments" / "claims"
section = load(CLAIMS / "section.py").section

ALL = (
    "fixed answer",
    "RuntimeError",
    "float16 is a cause",
    "memory is a cause",
    "Long prompts",
    "float32 is a cure",
    "bfloat16 is a cure",
    "Shorter prompts",
    "24 GB",
    "Without a GPU",
    "should be checked",
)


def drawn(dtype: str = "float16", **settings: object) -> Case:
    return run_case(dtype, **{"temperature": 1.0, "device": "cpu"} | settings)


def ranged(dtype: str = "float16", **settings: object) -> Case:
    return lengths_case(dtype, **{"device": "cpu"} | settings)


def starved(outcome: str, share: float = 0.5) -> tuple[Case, Shortage]:
    settings = {"dtype": "float32", "length": 64, "device": "cpu", "room": share}
    found = Shortage(
        dtype="float32", length=64, device="cpu", needed=1000, room=int(1000 * share), outcome=outcome,  # type: ignore[arg-type]
        reason=None if "finite" in outcome else "RuntimeError: can't allocate memory: 7 bytes",
    )  # fmt: skip
    return Case(kind="shortage", settings=settings), found


def sized(dtype: str, weights: float) -> tuple[Case, Footprint]:
    settings = {"model": "gemma-7b", "dtype": dtype, "length": 64, "device": "cuda"}
    found = Footprint(dtype=dtype, length=64, device="cuda", weights=int(weights), cache=1, activations=1)
    return Case(kind="footprint", settings=settings), found


def answered(text: str) -> dict[str, Any]:
    return {"case": {"next_text": text}}


GUIDE_IS_WRONG_WHERE_EXPECTED: list[tuple[Case, Any]] = [
    (drawn(), broken_run(**answered("<pad>"))),
    (drawn(temperature=0.0), broken_run(error=None, **answered("<pad>"))),
    (drawn(bos=False), clean_run(**answered(" Paris"))),
    (drawn("float32"), clean_run("float32", amax=70000.0, **answered(" Paris"))),
    (drawn("float32", bos=False), clean_run("float32", **answered(" Paris"))),
    (drawn("bfloat16"), clean_run("bfloat16", amax=70000.0, **answered(" Paris"))),
    (ranged(), broken_map(first=1)),
    (ranged(bos=False), broken_map(first=29)),
    (ranged(bos=False, prompt="repeat"), clean_map()),
    starved("raised"),
    starved("finite", 1.5),
    sized("bfloat16", 17e9),
    sized("float32", 34e9),
    (Case(kind="memory", settings={"dtype": "float32", "length": 128}), memory("float32")),
]


def verdicts(results: Results) -> dict[str, str]:
    table = next(block for block in section(results).blocks if isinstance(block, Table))
    rows = [(str(row[0]), str(row[2])) for row in table.rows]
    return {short: next(verdict for says, verdict in rows if short in says) for short in ALL}


def judged(folder: Path, pairs: Iterable[tuple[Case, object]]) -> dict[str, str]:
    return verdicts(sweep(folder / "claims", pairs))  # type: ignore[arg-type]


def test_each_claim_gets_the_verdict_its_evidence_asks_for(tmp_path: Path) -> None:
    assert judged(tmp_path, GUIDE_IS_WRONG_WHERE_EXPECTED) == {
        "fixed answer": "does not hold",
        "RuntimeError": "holds",
        "float16 is a cause": "holds",
        "memory is a cause": "does not hold",
        "Long prompts": "does not hold",
        "float32 is a cure": "holds",
        "bfloat16 is a cure": "holds",
        "Shorter prompts": "does not hold",
        "24 GB": "holds",
        "Without a GPU": "does not hold",
        "should be checked": "holds",
    }


def test_without_evidence_every_claim_is_left_open(tmp_path: Path) -> None:
    assert set(judged(tmp_path, [(drawn(), None)]).values()) == {"cannot be decided here"}


@pytest.mark.parametrize(
    ("claim", "pairs", "verdict"),
    [
        ("RuntimeError", [(drawn(), broken_run(error=None))], "does not hold"),
        ("RuntimeError", [(drawn(), broken_run()), (drawn("float32"), broken_run("float32"))], "does not hold"),
        ("float16 is a cause", [(drawn(), broken_run()), (drawn("float32"), broken_run("float32"))], "does not hold"),
        ("float16 is a cause", [(drawn(), broken_run())], "cannot be decided here"),
        ("memory is a cause", [starved("raised"), starved("not finite", 0.7)], "holds"),
        ("memory is a cause", [starved("finite", 1.5)], "cannot be decided here"),
        ("Long prompts", [(ranged(bos=False), broken_map(first=29))], "holds"),
        ("bfloat16 is a cure", [(drawn(), broken_run()), (drawn("bfloat16"), broken_run("bfloat16"))], "does not hold"),
        ("Shorter prompts", [(ranged(bos=False), broken_map(first=29))], "holds"),
        ("24 GB", [sized("bfloat16", 15e9)], "does not hold"),
        ("24 GB", [sized("bfloat16", 30e9)], "does not hold"),
        ("Without a GPU", [(drawn("bfloat16"), broken_run("bfloat16"))], "holds"),
        ("should be checked", [(drawn(), broken_run())], "does not hold"),
    ],
)
def test_other_evidence_gives_another_verdict(
    tmp_path: Path, claim: str, pairs: list[tuple[Case, Any]], verdict: str
) -> None:
    assert judged(tmp_path, pairs)[claim] == verdict


def test_numbers_in_the_reasons_are_those_of_the_cases(tmp_path: Path) -> None:
    found = section(sweep(tmp_path / "claims", GUIDE_IS_WRONG_WHERE_EXPECTED))
    text = " ".join(block.text for block in found.blocks if hasattr(block, "text"))
    assert "In 2 of 3 float16 runs every logit is lost, and greedy decoding then takes `'<pad>'`" in text
    assert "1 of 1 take the token that float32 takes" in text
    assert "With `<bos>` 1 of 1 text breaks with a single token" in text
    assert "prose from 29 tokens on breaks, and repeat does not up to 64" in text
    assert "prose without `<bos>` up to 28 tokens" in text
    assert "takes 17.0 GB with 64 tokens" in text


def test_every_figure_can_be_drawn_under_a_name_of_its_own(tmp_path: Path) -> None:
    blocks = section(sweep(tmp_path / "claims", GUIDE_IS_WRONG_WHERE_EXPECTED)).blocks
    names = [block.name for block in blocks if isinstance(block, Figure | Table)]
    assert len(set(names)) == len(names)
    for figure in (block for block in blocks if isinstance(block, Figure)):
        assert draw(figure).svg.startswith("<?xml")


def test_the_experiment_brings_this_section_along() -> None:
    read = read_experiment(CLAIMS / "claims.toml")
    assert read.sections[0] == str(CLAIMS / "section.py")
    assert list(read.own_sections) == [read.sections[0]]
