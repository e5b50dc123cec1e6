import json
from dataclasses import replace
from pathlib import Path

import pytest

from stabilitykit.errors import MisuseError
from stabilitykit.report.blocks import Figure, Section, Table
from stabilitykit.report.write import write_report


def section(*blocks: Figure | Table, key: str = "s") -> Section:
    return Section(key=key, title="S", opening="O.", blocks=blocks)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_empty_report_is_a_page_and_a_markdown_file(tmp_path: Path) -> None:
    assert write_report("Nothing", [], tmp_path) == tmp_path / "report.html"
    assert files(tmp_path) == {"report.html", "report.md", "report.files.json"}
    assert "This report has no sections." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_figure_and_table_is_a_file(tmp_path: Path, sections: list[Section]) -> None:
    seen: list[tuple[str, int, int]] = []
    write_report("All", sections, tmp_path, progress=lambda *step: seen.append(step))
    made = {"figures/peaks.svg", "figures/peaks.png", "figures/map.svg", "figures/map.png", "tables/mixed.csv"}
    assert files(tmp_path) == made | {"report.html", "report.md", "report.files.json"}
    assert json.loads((tmp_path / "report.files.json").read_text()) == sorted(made)
    assert seen == [("drawing figures", done, 2) for done in range(3)]


def test_writing_again_changes_no_byte(tmp_path: Path, sections: list[Section]) -> None:
    for folder in ("a", "b"):
        write_report("All", sections, tmp_path / folder)
    assert {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")} == {
        name: (tmp_path / "b" / name).read_bytes() for name in files(tmp_path / "b")
    }


def test_what_an_earlier_report_left_goes_and_a_users_file_stays(
    tmp_path: Path, heat: Figure, mixed: Table, long_table: Table
) -> None:
    write_report("One", [section(heat, mixed)], tmp_path)
    own = {"figures/mine.png", "tables/mine.csv", "figures/notes.txt"}
    for name in own:
        (tmp_path / name).write_text("mine")
    write_report("Two", [section(long_table)], tmp_path)
    assert files(tmp_path) == own | {"tables/long.csv", "report.html", "report.md", "report.files.json"}


def test_a_report_that_was_interrupted_leaves_no_orphan(tmp_path: Path, heat: Figure, lines: Figure) -> None:
    def fail(canvas: object) -> list[object]:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_report("One", [section(heat, replace(lines, draw=fail))], tmp_path)  # type: ignore[arg-type]
    assert "figures/map.png" in files(tmp_path)
    write_report("Two", [], tmp_path)
    assert files(tmp_path) == {"report.html", "report.md", "report.files.json"}


@pytest.mark.parametrize("listed", ['["../precious.txt"]', '["figures/../../precious.png"]', '{"a": 1}', "[1]", "half"])
def test_a_list_of_files_that_is_not_ours_is_refused(tmp_path: Path, listed: str) -> None:
    (tmp_path / "report.files.json").write_text(listed)
    with pytest.raises(MisuseError, match=r"this one does not\. Delete it and try again"):
        write_report("One", [], tmp_path)


def test_names_are_unique_and_fit_for_files(tmp_path: Path, mixed: Table, heat: Figure) -> None:
    with pytest.raises(ValueError, match="figure or table is unique in a report; mixed came more than once"):
        write_report("T", [section(mixed), section(replace(heat, name="mixed"), key="t")], tmp_path)
    with pytest.raises(ValueError, match="key of a section is unique in a report; s came"):
        write_report("T", [section(), section()], tmp_path)
    with pytest.raises(ValueError, match=r"letters, digits, - and _; '\.\./x' is not"):
        write_report("T", [section(replace(mixed, name="../x"))], tmp_path)
    assert files(tmp_path) == set()
