"""Which cases of a table run: a part of them that a seed chooses, so that a run in CI can be repeated."""

import random
from collections import defaultdict
from collections.abc import Iterable

SHARE = 1 / 5  # of each table, at least one case


def chosen(cases: Iterable[str], seed: int) -> set[str]:
    """Of each table's node ids a fifth: for one seed the same ones, whatever other tables there are."""
    tables: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        tables[case.partition("[")[0]].append(case)
    return {
        case
        for table, own in tables.items()
        for case in random.Random(f"{seed} {table}").sample(sorted(own), max(1, round(SHARE * len(own))))
    }
