from tables import chosen

TABLES = [f"test_a.py::test_{name}[{case}]" for name, size in (("long", 30), ("short", 2)) for case in range(size)]


def test_a_fifth_of_each_table_runs_and_at_least_one_case() -> None:
    found = chosen(TABLES, 0)
    assert found < set(TABLES)
    assert sum("long" in case for case in found) == 6
    assert sum("short" in case for case in found) == 1


def test_a_seed_always_chooses_the_same_cases_whatever_else_is_collected() -> None:
    found = chosen(TABLES, 7)
    assert (
        found
        == chosen(reversed(TABLES), 7)
        == chosen([*TABLES, "test_b.py::test_more[x]"], 7) - {"test_b.py::test_more[x]"}
    )


def test_every_case_is_some_seeds() -> None:
    assert set().union(*(chosen(TABLES, seed) for seed in range(40))) == set(TABLES)
