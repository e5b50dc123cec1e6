"""Where the numbers come from: the checkpoint, the versions, the machine, the command, and what became of each case."""

from collections import Counter

from stabilitykit.records.sweep import Case, Results
from stabilitykit.report.blocks import Block, Column, Prose, Section, Table
from stabilitykit.report.tables import table
from stabilitykit.words import code, count, listed, sentence


def section(results: Results) -> Section:
    """From the plan, and for the arithmetic of matrix products from the headers of the finished cases."""
    blocks: list[Block] = [
        Prose(f"To make this again: {code(results.plan.command)}"),
        _origin(results),
        _experiment(results),
        _cases(results),
        *([_skipped(results)] if results.plan.skipped else []),
    ]
    return Section(
        key="provenance",
        title="Provenance",
        opening=f"What it takes to reproduce these numbers. {_states(results)} Another machine or version may "
        "round the last bits differently, so values next to a limit can fall on its other side.",
        blocks=blocks,
    )


def _states(results: Results) -> str:
    states = Counter(_state(results, case)[0] for case in results.plan.cases)
    if not results.plan.cases:
        return "The plan holds no case."
    total, done = len(results.plan.cases), states["done"]
    if done == total:
        return "Its only case is done." if total == 1 else f"All {total:,} cases are done."
    others = [f"{states[state]:,} {state}" for state in ("failed", "missing") if states[state]]
    return f"Of {count(total, 'case')}, {done:,} {'is' if done == 1 else 'are'} done, {listed(others)}."


def _state(results: Results, case: Case) -> tuple[str, str | None]:
    """Its state, and the reason for a failure."""
    if results.is_done(case):
        return "done", None
    failure = results.failure(case)
    return ("missing", None) if failure is None else ("failed", f"{failure.kind}: {sentence(failure.reason)}")


def _origin(results: Results) -> Table:
    plan = results.plan
    facts: list[tuple[str, str, object]] = [
        ("checkpoint", "name", plan.checkpoint),
        ("checkpoint", "SHA-256", plan.sha256),
        *(("checkpoint", "note", note) for note in plan.notes),
        *(("matrix products", where, how) for where, how in _arithmetic(results)),
        *(("version", name, version) for name, version in sorted(plan.versions.items())),
        *(("machine", name, value) for name, value in sorted(plan.machine.items())),
        *(("model", name, value) for name, value in sorted(plan.config.items())),
    ]
    return table(
        "provenance",
        "Checkpoint, versions and machine",
        facts,
        [
            (Column("of"), lambda fact: fact[0]),
            (Column("what"), lambda fact: fact[1]),
            (Column("value"), lambda fact: None if fact[2] is None else str(fact[2])),
        ],
    )


def _arithmetic(results: Results) -> list[tuple[str, str]]:
    """How the finished cases multiplied matrices, by dtype and device."""
    found: dict[str, list[str]] = {}
    headers = [recording.header for _, recording in results.runs()]
    headers += [lengths.header for _, lengths in results.length_maps()]
    for header in headers:
        ways = found.setdefault(f"{header.dtype} on {header.device}", [])
        if header.matmul not in ways:
            ways.append(header.matmul)
    return [(where, ", ".join(ways)) for where, ways in found.items()] or [("any", "not known: no run has finished")]


def _experiment(results: Results) -> Table:
    return table(
        "experiment-file",
        "The experiment's file",
        enumerate(results.plan.source.splitlines(), start=1),
        [(Column("line"), lambda line: line[0]), (Column("text"), lambda line: line[1])],
    )


def _cases(results: Results) -> Table:
    return table(
        "cases",
        "Every case",
        [(case, *_state(results, case)) for case in results.plan.cases],
        [
            (Column("kind"), lambda told: told[0].kind),
            (Column("case"), lambda told: str(told[0])),
            (Column("state"), lambda told: told[1]),
            (Column("reason"), lambda told: told[2]),
            (Column("file"), lambda told: told[0].id),
        ],
        note="Done cases are files under records/, by the name in the last column. Running the command again does "
        "those that are missing.",
        alarming=lambda told: told[1] == "failed",
    )


def _skipped(results: Results) -> Table:
    return table(
        "skipped",
        "Lengths that a text does not reach",
        results.plan.skipped,
        [
            (Column("prompt"), lambda one: one.prompt),
            (Column("length", unit="tokens"), lambda one: str(one.length)),
            (Column("has", unit="tokens"), lambda one: one.tokens),
            (Column("<bos>"), lambda one: "with" if one.bos else "without"),
        ],
        note="Nothing ran at these lengths; of a range, at those past what the text has.",
    )
