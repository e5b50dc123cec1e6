import re

from stabilitykit.report.blocks import Prose, Section, Table
from stabilitykit.report.html import html

HOSTILE = "<script>alert(1)</script>"


def page(*blocks: Prose | Table, opening: str = "O.") -> str:
    return html("T", [Section(key="s", title="S", opening=opening, blocks=blocks)], {})


def test_an_empty_report_is_a_page_that_says_so() -> None:
    text = html("Nothing", [], {})
    assert "<title>Nothing</title>" in text
    assert "<p>This report has no sections.</p>" in text
    assert "<nav" not in text


def test_the_first_section_is_the_panel_and_each_opens_with_its_opening() -> None:
    sections = [Section(key=key, title=key.upper(), opening=f"{key} opens.") for key in ("verdict", "rest")]
    text = html("T", sections, {})
    assert re.findall(r'<section id="(\w+)"( class="panel")?>\s*<h2>.*</h2>\s*<p class="opening">(.*)</p>', text) == [
        ("verdict", ' class="panel"', "verdict opens."),
        ("rest", "", "rest opens."),
    ]
    assert re.findall(r'<li><a href="#(\w+)">', text) == ["verdict", "rest"]


def test_prose_has_code_and_bold_and_nothing_else() -> None:
    text = page(Prose(f"**at `<bos>`** & {HOSTILE}"))
    expected = (
        "<strong>at </strong><strong><code>&lt;bos&gt;</code></strong> &amp; &lt;script&gt;alert(1)&lt;/script&gt;"
    )
    assert f"<p>{expected}</p>" in text


def test_a_cell_shows_its_text_and_sorts_by_its_number(mixed: Table) -> None:
    text = page(mixed)
    rows = re.findall(r"<tr>(<td.*?)</tr>", text, flags=re.DOTALL)
    assert rows[0] == (
        '<td>a|b</td><td data-value="1000.0" class="number">1,000</td>'
        '<td data-value="0.25" class="number">0.25</td><td data-value="1.0">yes</td>'
    )
    assert rows[1].count('data-value=""') == 1
    assert 'data-value="" class="number">NaN<' in rows[3]
    assert 'data-value="Infinity" class="number">inf<' in rows[4]


def test_nothing_is_fetched_from_anywhere(mixed: Table) -> None:
    text = page(mixed)
    links = re.findall(r'\b(?:src|href)="([^"]*)"', text)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:;" in text


def test_what_a_table_says_cannot_run(mixed: Table) -> None:
    hostile = Table(name="h", title=HOSTILE, columns=mixed.columns[:1], rows=[(HOSTILE,)], note=HOSTILE)
    assert page(hostile, opening=HOSTILE).count("<script>") == 1  # the page's own


def test_a_table_without_rows_says_so(mixed: Table) -> None:
    empty = Table(name="e", title="E", columns=mixed.columns, rows=[])
    assert '<td colspan="4">No rows.</td>' in page(empty)
