"""The page in a real browser: headless Chromium, driven by Selenium, with every request and message logged."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import CHROMIUM, DRIVER, chromium, emulate, requested, visit
from swept import broken_map, lengths_case, sweep

from stabilitykit.report.blocks import Section, Table
from stabilitykit.report.sections import lengths, verdict
from stabilitykit.report.write import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no browser: `chromium` and `chromedriver` are not both installed"
)

PHONE, SHEET = 390, 690  # CSS pixels; a sheet of A4 between its margins

# Everything that can be read, with its colour and the first ground behind it that is not transparent.
READABLE = """
const ground = (part) => {
  for (; part; part = part.parentElement) {
    const colour = getComputedStyle(part).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
return [...document.querySelectorAll("h1, h2 a, p, code, td, th button, th small, strong, nav a, .csv, svg text")]
  .map((part) => {
    const style = getComputedStyle(part);
    return [part.textContent.trim(), part.closest("svg") ? style.fill : style.color, ground(part)];
  });
"""

# Parts whose edge is outside what holds them.
CLIPPED = """
const sheet = document.documentElement.clientWidth;
return [...document.querySelectorAll("h1, p, svg, table, td, figcaption, .scroll, .panel")]
  .filter((part) => {
    const box = part.getBoundingClientRect();
    const hides = getComputedStyle(part).overflowX !== "visible" && part.tagName !== "svg";
    return box.right > sheet + 0.5 || box.left < -0.5 ||
      (hides && (part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight));
  })
  .map((part) => part.outerHTML.slice(0, 80));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, sections: list[Section], long_table: Table) -> Path:
    more = Section(key="long", title="A long table", opening="Scrolls.", blocks=[long_table])
    return write_report("float16 & <bos>", [*sections, more], tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    emulate(browser)
    visit(browser, page.as_uri())
    WebDriverWait(browser, 30).until(
        lambda driver: driver.execute_script("return document.readyState === 'complete' && document.scripts.length > 0")
    )
    return browser


def column(browser: Any, heading: str) -> list[str]:
    """The texts of a column of the table "mixed", as they stand."""
    return list(
        browser.execute_script(
            """
            const table = document.querySelector("#table-mixed table");
            const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.startsWith(arguments[0]));
            return [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
            """,
            heading,
        )
    )


def button(browser: Any, heading: str) -> Any:
    return browser.find_element("xpath", f"//*[@id='table-mixed']//th/button[starts-with(., '{heading}')]")


def test_every_figure_is_shown(opened: Any) -> None:
    drawings = opened.find_elements("css selector", "figure.drawing svg[role=img]")
    assert [drawing.get_attribute("aria-label") for drawing in drawings] == ['rising "lines"', "a heat map"]
    assert all(drawing.size["width"] > 500 and drawing.size["height"] > 200 for drawing in drawings)
    for kind in ("path", "text", "image"):
        sizes = opened.execute_script(
            "return [...document.querySelectorAll(`figure.drawing svg ${arguments[0]}`)]"
            ".filter((part) => !part.closest('defs')).map((part) => part.getBoundingClientRect())"
            ".map((box) => Math.max(box.width, box.height))",
            kind,
        )
        assert sizes
        assert max(sizes) > 20


def test_nothing_is_said_on_the_console_and_nothing_is_fetched(opened: Any, page: Path) -> None:
    button(opened, "length").click()
    assert opened.get_log("browser") == []
    assert requested(opened) == [page.as_uri()]


def test_the_policy_refuses_a_request(opened: Any) -> None:
    """That nothing was fetched would mean little if this page could: it cannot, and the log does show it."""
    opened.execute_script("document.body.append(Object.assign(new Image(), {src: 'https://example.invalid/x.png'}))")
    assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))


def test_a_table_sorts_by_number_with_gaps_last_and_equals_in_order(opened: Any) -> None:
    assert column(opened, "headroom") == ["0.25", "–", "-3.0", "NaN", "inf"]
    button(opened, "headroom").click()
    assert column(opened, "headroom") == ["-3.0", "0.25", "inf", "–", "NaN"]
    button(opened, "headroom").click()
    assert column(opened, "headroom") == ["inf", "0.25", "-3.0", "–", "NaN"]

    opened.refresh()
    button(opened, "length").click()
    assert column(opened, "length") == ["7", "12", "12", "300", "1,000"]
    assert column(opened, "text")[1:3] == ["<bos>", "*two*\nlines"]
    button(opened, "length").click()
    assert column(opened, "length") == ["1,000", "300", "12", "12", "7"]
    assert column(opened, "text")[2:4] == ["<bos>", "*two*\nlines"]


def test_a_table_sorts_by_text_from_the_keyboard_and_says_how(opened: Any) -> None:
    def sorts() -> list[str]:
        headings = opened.find_elements("css selector", "#table-mixed th")
        return [heading.get_attribute("aria-sort") for heading in headings]

    assert sorts() == ["none"] * 4
    button(opened, "text").send_keys("\ue007")  # Enter
    assert sorts() == ["ascending", "none", "none", "none"]
    assert column(opened, "text")[-1] == "–"
    button(opened, "text").send_keys("\ue007")
    assert sorts() == ["descending", "none", "none", "none"]
    assert column(opened, "text") == ["a|b", "<bos>", "*two*\nlines", "_x_ float8_e4m3fn", "–"]
    button(opened, "length").send_keys(" ")
    assert sorts() == ["none", "ascending", "none", "none"]


def test_cells_of_a_heat_map_say_their_value(opened: Any) -> None:
    titles = opened.find_elements("css selector", "#figure-map .hover rect title")
    said = [title.get_attribute("textContent") for title in titles]
    assert said == [
        f"layer {c}: {v} & more" for c, v in ((0, 3.0), (1, -0.5), (2, "nan"), (0, "inf"), (1, 1.25), (2, "-inf"))
    ]
    cell = opened.find_elements("css selector", "#figure-map .hover rect")[1]
    webdriver.ActionChains(opened).move_to_element(cell).perform()
    assert opened.find_element("css selector", "#figure-map .readout").text == "layer 1: -0.5 & more"


SHOWN = """
const rows = [...arguments[0].tBodies[0].rows].filter((row) => row.offsetHeight > 0);
return rows.map((row) => row.cells[0].textContent);
"""


def test_a_long_table_shows_its_first_rows_and_by_a_button_all_of_them(opened: Any) -> None:
    table = opened.find_element("css selector", "#table-long table")
    assert opened.execute_script(SHOWN, table) == [str(n) for n in range(1, 13)]
    heading = opened.find_element("css selector", "#table-long th button")
    for _ in range(2):
        heading.send_keys("\ue007")  # Enter
    assert opened.execute_script(SHOWN, table)[:2] == ["60", "59"]  # the first of them all, not of those shown before
    more = opened.find_element("css selector", "#table-long button.all")
    assert more.text == "Show all 60 rows"
    more.send_keys("\ue007")
    assert len(opened.execute_script(SHOWN, table)) == 60
    assert not opened.find_elements("css selector", "#table-long button.all")
    assert not opened.find_elements("css selector", "#table-mixed button.all")


def test_without_scripts_every_row_is_there(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(page.as_uri())
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert len(browser.execute_script(SHOWN, browser.find_element("css selector", "#table-long table"))) == 60
    assert not browser.find_element("css selector", "#table-long button.all").is_displayed()


def test_nothing_scrolls_up_and_down_but_the_page(opened: Any) -> None:
    inside = opened.execute_script(
        """
        return [...document.querySelectorAll("main *")]
          .filter((part) => part.scrollHeight > part.clientHeight + 1 && part.clientHeight > 0)
          .filter((part) => ["auto", "scroll"].includes(getComputedStyle(part).overflowY))
          .map((part) => part.outerHTML.slice(0, 80));
        """
    )
    assert inside == []


NARROW = 1280


def test_the_widest_tables_of_a_verdict_are_whole_at_1280_pixels(browser: Any, tmp_path: Path) -> None:
    """With the longest texts that a sweep of the kit's own prompts has."""
    named = {"prompt": "word: attention", "bos": False}
    found = {dtype: broken_map(dtype, first=1025, longest=4096) for dtype in ("bfloat16", "float16")}
    results = sweep(tmp_path / "toy", [(lengths_case(dtype, **named), one) for dtype, one in found.items()])
    page = write_report("Toy", [verdict.section(results), lengths.section(results)], tmp_path / "out")
    emulate(browser, width=NARROW)
    browser.get(page.as_uri())
    for name in ("verdict", "first-breaks"):
        scroll = browser.find_element("css selector", f"#table-{name} .scroll")
        across, shown = browser.execute_script("return [arguments[0].scrollWidth, arguments[0].clientWidth]", scroll)
        assert across <= shown, name
    (numbers,) = browser.execute_script(
        """
        const cells = document.querySelectorAll("#table-first-breaks td.number");
        return [[...new Set([...cells].map((cell) => getComputedStyle(cell).textAlign))]];
        """
    )
    assert numbers == ["right"]


def test_on_a_phone_a_row_is_a_card_whose_cells_have_the_names_of_their_columns(opened: Any) -> None:
    emulate(opened, width=PHONE)
    labels = opened.execute_script(
        """
        const row = document.querySelector("#table-mixed tbody tr");
        return [...row.cells].map((cell) => getComputedStyle(cell, "::before").content);
        """
    )
    assert labels == ['"text"', '"length [tokens]"', '"headroom [bits]"', '"clean"']
    boxes = opened.execute_script(
        """
        const cells = document.querySelectorAll("#table-mixed td");
        return [...cells].map((cell) => cell.getBoundingClientRect()).map((box) => [box.left, box.right]);
        """
    )
    assert all(0 <= left < right <= PHONE for left, right in boxes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_light_and_dark(opened: Any, scheme: str) -> None:
    emulate(opened, scheme=scheme)
    found = opened.execute_script(READABLE)
    assert {"10⁵", "float16 maximum, 65,504", "Peaks", "layer"} <= {text for text, _, _ in found}
    assert {text: contrast(ink, ground) for text, ink, ground in found if contrast(ink, ground) < 4.5} == {}
    page_ground = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(page_ground) < 0.1) == (scheme == "dark")
    lines = opened.execute_script(
        """
        const paths = document.querySelectorAll("#figure-peaks svg g[id*=line2d] path");
        return [...paths].map((path) => getComputedStyle(path).stroke);
        """
    )
    seen = [contrast(line, page_ground) for line in lines if line != "none"]
    assert sum(ratio > 3 for ratio in seen) >= 3


def contrast(ink: str, ground: str) -> float:
    """WCAG 2's ratio, 1 to 21."""
    low, high = sorted((luminance(ink), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    srgb = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in srgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_on_a_phone_only_figures_and_headings_scroll_sideways(opened: Any) -> None:
    emulate(opened, width=PHONE)
    page, sheet, scrolls = opened.execute_script(
        """
        const page = document.documentElement, parts = [...document.querySelectorAll(".scroll")];
        return [page.scrollWidth, page.clientWidth, parts.some((part) => part.scrollWidth > part.clientWidth)];
        """
    )
    assert page <= sheet <= PHONE
    assert scrolls
    assert opened.find_element("css selector", "#figure-peaks svg").size["width"] > 500  # or its text is too small


def test_in_print_nothing_is_clipped(opened: Any) -> None:
    emulate(opened, width=PHONE)
    assert opened.execute_script(CLIPPED)  # a figure scrolls on a phone: the question can be answered with yes
    emulate(opened, media="print", scheme="dark", width=SHEET)
    assert opened.execute_script(CLIPPED) == []
    assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = "return [...document.querySelectorAll('.drawing, tr')].map((part) => getComputedStyle(part).breakInside)"
    assert set(opened.execute_script(cut)) == {"avoid"}
    assert len(opened.execute_script(SHOWN, opened.find_element("css selector", "#table-long table"))) == 60
    pdf = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF-")
