import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Canvas

from stabilitykit.errors import MisuseError
from stabilitykit.report.blocks import Figure, Hover, Section, Table
from stabilitykit.report.earlier import fingerprint
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
    assert json.loads((tmp_path / "report.files.json").read_text())["files"] == sorted(made)
    assert seen == [("drawing figures", done, 2) for done in range(3)]


def test_writing_again_changes_no_byte(tmp_path: Path, sections: list[Section]) -> None:
    for folder in ("a", "b"):
        write_report("All", sections, tmp_path / folder)
    assert {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")} == {
        name: (tmp_path / "b" / name).read_bytes() for name in files(tmp_path / "b")
    }


def test_figures_stay_while_what_they_are_drawn_from_and_their_files_do(tmp_path: Path, heat: Figure) -> None:
    drawn = []

    def draw(canvas: Canvas) -> list[Hover]:
        drawn.append(1)
        return list(heat.draw(canvas))

    def again(made_from: str | None) -> int:
        """How often the figure is drawn; its page is the same in any case."""
        drawn.clear()
        page = write_report("R", [section(replace(heat, draw=draw))], tmp_path, made_from=made_from)
        assert page.read_bytes() == first
        return len(drawn)

    first = write_report("R", [section(replace(heat, draw=draw))], tmp_path, made_from="a").read_bytes()
    assert [again("a"), again("b"), again("b"), again(None), again(None)] == [0, 1, 0, 1, 1]
    assert [again("a"), again("a")] == [1, 0]
    for kind in ("png", "svg"):
        (tmp_path / f"figures/map.{kind}").write_bytes(b"damaged")
        assert [again("a"), again("a")] == [1, 0]
        (tmp_path / f"figures/map.{kind}").unlink()
        assert [again("a"), again("a")] == [1, 0]


def test_what_figures_are_drawn_from_is_every_file_but_the_reports_own(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records/a.json").write_text("1")
    before = fingerprint(tmp_path, "float16")
    write_report("R", [], tmp_path)
    assert fingerprint(tmp_path, "float16") == before
    assert fingerprint(tmp_path, "bfloat16") != before
    (tmp_path / "records/a.json").write_text("2")
    assert fingerprint(tmp_path, "float16") != before
    (tmp_path / "records/a.json").write_text("1")
    (tmp_path / "records/b.json").write_text("")
    assert fingerprint(tmp_path, "float16") != before


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
