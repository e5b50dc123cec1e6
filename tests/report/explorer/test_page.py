"""The explorer in a real browser: it shows what the records say, by the mouse, the keyboard and the address."""

import math
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsing import CHROMIUM, DRIVER, chromium, emulate, requested, visit
from explored import HOSTILE, toy_run
from swept import run_case, sweep

from stabilitykit.formats import number_format
from stabilitykit.records import Record
from stabilitykit.records.sweep import Results
from stabilitykit.report.explorer.classes import CLASSES
from stabilitykit.report.sections import SECTIONS
from stabilitykit.report.write import write_report

WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui", reason="Selenium is not installed").WebDriverWait
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no browser: `chromium` and `chromedriver` are not both installed"
)

AXE = (Path(__file__).parents[1] / "vendor" / "axe-core-4.14.1" / "axe.min.js").read_text(encoding="utf-8")
RUN, LENGTHS = "prose-3-tokens-with-bos", "prose-every-length-to-64-with-bos"


# The parts of the map that tests ask for, before their own line of script.
MAP = """
const heads = [...document.querySelectorAll(".map .line.head:not(.dtypes) .cell")].map((head) => head.ariaLabel);
const lines = [...document.querySelectorAll(".map .line:not(.head)")];
const nameOf = (line) => line.querySelector(".name").textContent;
"""


@pytest.fixture(scope="module")
def page(toy: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections = [SECTIONS[name](toy) for name in ("verdict", "explore", "chain")]
    return write_report("A toy", sections, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, page: Path) -> Open:
    """Opens the page at an address of the explorer's, on a screen of some width."""

    def go(fragment: str = "", *, width: int = 1280, scheme: str = "light") -> Any:
        emulate(browser, width=width, scheme=scheme)
        visit(browser, page.as_uri() + fragment)
        ready(browser)
        return browser

    return go


def ready(browser: Any) -> None:
    """Waits for the records to be read, and for what is drawn in the next frame."""
    WebDriverWait(browser, 30).until(
        lambda driver: driver.execute_script("return document.getElementById('explorer')?.dataset.ready === 'true'")
    )
    drawn(browser)


def drawn(browser: Any) -> None:
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done));")


def text(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def cells(browser: Any) -> dict[tuple[str, str], tuple[str, str]]:
    """Numeral and class of each cell that is not empty, by the row's name and the column's."""
    found = browser.execute_script(
        MAP
        + """
        return lines.filter((line) => !line.hidden).flatMap((line) =>
          [...line.querySelectorAll(".cell")].map((part, at) =>
            [nameOf(line), heads[at], part.cell.numeral ?? "", part.cell.look ?? "none"]));
        """
    )
    look = {(row, column): (numeral, name) for row, column, numeral, name in found}
    return {place: shown for place, shown in look.items() if shown[1] != "none"}


def choose(browser: Any, row: str, column: str) -> Any:
    """Clicks a cell."""
    cell = browser.execute_script(
        MAP
        + """
        const line = lines.find((line) => nameOf(line) === arguments[0]);
        return line.querySelectorAll(".cell")[heads.indexOf(arguments[1])];
        """,
        row,
        column,
    )
    cell.click()
    drawn(browser)
    return cell


def record_table(browser: Any, caption: str) -> dict[str, list[str]]:
    """The cells of a table beside the map, by the heading of the row."""
    rows = browser.execute_script(
        """
        const tables = [...document.querySelectorAll(".record .tables table")];
        const table = tables.find((table) => table.caption.textContent.startsWith(arguments[0]));
        return [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent));
        """,
        caption,
    )
    return {name: values for name, *values in rows}


def slide(browser: Any, to: int) -> None:
    browser.execute_script(
        """
        const slider = document.querySelector("#explorer [name=at]");
        slider.value = arguments[0];
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        """,
        to,
    )
    drawn(browser)


def expected(amax: float, form: str = "float16") -> tuple[str, str]:
    """Numeral and class, by the format's own arithmetic."""
    found = number_format(form)
    room = found.headroom(amax)
    if found.overflows(amax):
        return f"−{max(1, math.ceil(-room))}", "over"
    least = max((c for c in CLASSES if c.least <= max(room, 0)), key=lambda c: c.least)
    return str(max(0, math.floor(room))), least.key


def about(amax: float, within: float) -> set[tuple[str, str]]:
    """What may be shown of a magnitude that is kept within this share of it."""
    return {expected(amax * (1 + part)) for part in (-within, 0, within)}


def row_of(record: Record) -> str:
    return record.label or record.site.split("/", 1)[-1]


def column_of(record: Record) -> str:
    return "outside the layers" if record.layer is None else f"layer {record.layer}"


def test_at_first_the_first_break_is_chosen_and_told(opened: Open) -> None:
    browser = opened()
    assert text(browser, "#explorer-place") == "layer 1, residual after MLP"
    assert text(browser, ".said") == (
        "float16: the run breaks here, at token 0 '<bos>', channel 2: 68,000 exceeds the float16 maximum, 65,504."
    )
    assert cells(browser)["residual after MLP", "layer 1"] == ("×", "breaks")
    assert browser.execute_script("return location.hash") == ""
    assert len(browser.find_elements("css selector", ".record .plot canvas")) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_cell_is_its_record(opened: Open, toy: Results, dtype: str) -> None:
    browser = opened(f"#explore/{dtype}/{RUN}/all/lm_head")
    recording = next(run for _, run in toy.runs() if run.header.dtype == dtype)
    wanted = {}
    for record in recording:
        if record.stored_dtype == "float32":
            continue  # computed wider on purpose: shown when asked for
        lost = ("–", "lost")
        broken = ("×", "breaks")
        said = broken if record.broke else lost if record.lost or record.amax is None else expected(record.amax)
        wanted[row_of(record), column_of(record)] = said
    assert cells(browser) == wanted
    browser.find_element("css selector", "#explorer [name=inside]").click()
    assert cells(browser) == wanted | {("norm/pow.0", "layer 1"): expected(1e9)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_have_the_colours_of_their_classes(opened: Open, scheme: str) -> None:
    """The pixel beside a cell's number, against the table of colours."""
    browser = opened(f"#explore/float32/{RUN}/all/layers.1", scheme=scheme)
    shown = cells(browser)
    for place in (
        ("residual after MLP", "layer 0"),
        ("residual after MLP", "layer 1"),
        ("logits", "outside the layers"),
    ):
        found = browser.execute_script(
            MAP
            + """
            const line = lines.find((line) => nameOf(line) === arguments[0]);
            const cell = line.querySelectorAll(".cell")[heads.indexOf(arguments[1])].getBoundingClientRect();
            const canvas = document.querySelector(".map canvas"), at = canvas.getBoundingClientRect();
            const pen = canvas.getContext("2d");
            return [...pen.getImageData(cell.left - at.left + 2, cell.top - at.top + 2, 1, 1).data].slice(0, 3);
            """,
            *place,
        )
        colour = getattr(next(c for c in CLASSES if c.key == shown[place][1]), scheme)[0]
        assert found == [int(colour[at : at + 2], 16) for at in (1, 3, 5)], place


def test_screen_readers_are_told_what_a_cell_is(opened: Open) -> None:
    browser = opened(f"#explore/float16/{RUN}/all/layers.1")
    named = "return [...document.querySelectorAll('.map [role=gridcell][tabindex]')].map((cell) => cell.ariaLabel)"
    WebDriverWait(browser, 10).until(lambda driver: None not in driver.execute_script(named))
    assert browser.execute_script(named) == [
        "13 bits",
        "16 bits",
        "8 bits",
        "breaks here",
        "10 bits",
        "inf or NaN, or after a break",
    ]


def test_a_click_shows_the_record_of_every_dtype(opened: Open) -> None:
    browser = opened(f"#explore/float16/{RUN}/all/layers.1")
    choose(browser, "residual after MLP", "layer 0")
    assert text(browser, "#explorer-place") == "layer 0, residual after MLP"
    assert text(browser, ".path") == "layers.0, operator add, 1 × 3 × 4"
    shown = record_table(browser, "Record")
    assert shown["largest magnitude"] == ["200", "200", "300"]
    assert shown["headroom [bits]"] == ["8.4", "8.4", "7.8"]
    assert shown["at token"] == ["0 '<bos>'"] * 3
    assert shown["minimum"] == ["−100", "−100", "−150"]
    assert shown["SQNR against float32 [dB]"] == ["–", "46.3", "46.3"]
    casts = record_table(browser, "Cast from the float16 run to")
    assert casts == {"float16": ["8.4", "0", "2", "3"], "bfloat16": ["120.4", "0", "2", "3"]}
    choose(browser, "attention probabilities", "layer 0")
    assert record_table(browser, "Record")["mean entropy [nats]"] == ["1.25"] * 3
    choose(browser, "residual after MLP", "layer 1")
    assert record_table(browser, "Operands") == {"layers.0/add.0": ["60,000"], "layers.0.mlp.down_proj": ["8,000"]}


def test_curves_have_their_numbers_in_tables(opened: Open) -> None:
    browser = opened(f"#explore/float32/{RUN}/all/layers.0")
    for summary in browser.find_elements("css selector", ".charts summary"):
        summary.click()
    drawn(browser)
    tables = browser.execute_script(
        """
        return [...document.querySelectorAll(".charts details table")].map((table) =>
          [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent)));
        """
    )
    exponents, positions = tables
    assert exponents[0] == ["from", "float32", "float16", "bfloat16"]
    assert exponents[1:] == [["2⁻¹", *["11"] * 3], *[[f"2{power}", *["0"] * 3] for power in "⁰¹²"], ["2³", *["1"] * 3]]
    assert positions[0] == ["position", "float32", "float16", "bfloat16"]
    near = [[float(value.replace(",", "")) for value in row[1:]] for row in positions[1:]]
    assert near == [[pytest.approx(v, rel=0.022) for v in row] for row in ([200, 200, 300], [100] * 3, [50] * 3)]


def test_the_slider_goes_through_the_positions(opened: Open) -> None:
    browser = opened(f"#explore/float32/{RUN}/all/layers.1")
    assert text(browser, "output") == "all 3 positions"
    slide(browser, 2)
    assert text(browser, "output") == "token 1 '</script><b>'"
    shown = cells(browser)
    for row, column, amax in (
        ("embedding, scaled", "outside the layers", 2.0),
        ("residual after MLP", "layer 0", 100.0),
        ("residual after MLP", "layer 1", 30000.0),
    ):
        assert shown[row, column] in about(amax, 0.022)
    assert "at token 1 '</script><b>': largest magnitude about 30,000; 1.1 bits" in text(browser, ".said")
    slide(browser, 0)
    assert cells(browser)["residual after MLP", "layer 1"] == expected(68000.0)


def test_the_slider_goes_through_the_lengths(opened: Open, toy: Results) -> None:
    """By `LengthMap.amax`, which knows of no explorer; from 29 tokens on layer 1 breaks."""
    browser = opened(f"#explore/float16/{LENGTHS}/length-28/layers.0")
    maps = {found.header.dtype: found for _, found in toy.length_maps()}
    for length in (1, 28):
        slide(browser, length)
        amax = maps["float16"].amax("layers.0", length)
        assert amax is not None
        shown = cells(browser)
        assert shown.pop(("output", "layer 0")) in about(amax, 0.011)
        assert shown == {}
    slide(browser, 29)
    assert text(browser, "output") == "29 tokens"
    spans = record_table(browser, "First break")
    assert spans["float16"] == ["29 to 64", "layer 1, residual after MLP", "token 28 '.'"]
    browser.find_element("css selector", "#explorer [name=dtype][value='1']").click()
    slide(browser, 4)
    assert cells(browser)["output", "layer 0"] in about(4094.0, 0.011)
    slide(browser, 5)
    assert cells(browser)["output", "layer 0"] in about(8188.0, 0.011)


def test_dtypes_stand_side_by_side(opened: Open) -> None:
    browser = opened()
    browser.find_element("css selector", "#explorer [name=dtype][value=side]").click()
    shown = cells(browser)
    for dtype, look in (("float32", "over"), ("float16", "breaks"), ("bfloat16", "over")):
        assert shown["residual after MLP", f"{dtype}, layer 1"][1] == look
    assert text(browser, "#explorer-place") == "layer 1, residual after MLP"
    choose(browser, "residual after MLP", "bfloat16, layer 0")
    assert text(browser, ".said").startswith("bfloat16: largest magnitude 300, at token 0 '<bos>'")


def test_headroom_is_in_the_format_that_is_chosen(opened: Open) -> None:
    browser = opened(f"#explore/float32/{RUN}/all/layers.1?format=bfloat16")
    assert cells(browser)["residual after MLP", "layer 1"] == expected(68000.0, "bfloat16")
    assert "bits of headroom in bfloat16" in text(browser, ".said")


def test_sites_are_filtered_by_site_and_by_label(opened: Open) -> None:
    browser = opened()
    box = browser.find_element("css selector", "#explorer [name=filter]")
    box.send_keys("RESIDUAL")
    assert {row for row, _ in cells(browser)} == {"residual after MLP"}
    assert text(browser, ".found") == "1 of 5 sites"
    box.clear()
    box.send_keys("layers.0 soft")
    assert {row for row, _ in cells(browser)} == {"attention probabilities"}
    focusable = browser.find_elements("css selector", ".map [tabindex='0']")
    assert [cell.is_displayed() for cell in focusable] == [True]
    box.clear()
    box.send_keys("nothing of the kind")
    assert cells(browser) == {}
    assert text(browser, ".found") == "0 of 5 sites"


def test_the_map_is_one_stop_of_the_keyboard_and_arrows_go_through_it(opened: Open) -> None:
    browser = opened()
    cell = browser.find_element("css selector", ".map [tabindex='0']")
    cell.click()

    def press(key: str) -> str:
        browser.switch_to.active_element.send_keys(key)
        drawn(browser)
        (stop,) = browser.find_elements("css selector", ".map [tabindex='0']")
        assert stop == browser.switch_to.active_element
        assert stop.get_attribute("aria-selected") == "true"
        return text(browser, "#explorer-place")

    assert press(Keys.ARROW_LEFT) == "layer 0, residual after MLP"
    assert press(Keys.ARROW_LEFT) == "layer 0, residual after MLP"  # there is nothing further
    assert press(Keys.ARROW_UP) == "layer 0, attention probabilities"
    assert press(Keys.ARROW_UP) == "embedding, scaled"
    assert press(Keys.ARROW_DOWN) == "layer 0, attention probabilities"
    assert press(Keys.ARROW_DOWN) == "layer 0, residual after MLP"
    assert press(Keys.ARROW_RIGHT) == "layer 1, residual after MLP"
    assert press(Keys.ARROW_UP) == "layer 0, attention probabilities"  # layer 1 has none
    assert press(Keys.ARROW_DOWN) == "layer 1, residual after MLP"
    assert press(Keys.ARROW_UP) == "layer 0, attention probabilities"
    assert press(Keys.END) == "layer 0, attention probabilities"
    browser.switch_to.active_element.send_keys(Keys.CONTROL, Keys.END)
    assert text(browser, "#explorer-place") == "logits"
    browser.switch_to.active_element.send_keys(Keys.CONTROL, Keys.HOME)
    assert text(browser, "#explorer-place") == "embedding, scaled"


def test_a_view_has_an_address_that_opens_it_again(opened: Open, browser: Any) -> None:
    opened()
    choose(browser, "residual after MLP", "layer 0")
    slide(browser, 3)
    WebDriverWait(browser, 10).until(lambda driver: driver.execute_script("return location.hash") != "")
    fragment = browser.execute_script("return location.hash")
    assert fragment == f"#explore/float16/{RUN}/token-2/layers.0"
    before = (cells(browser), text(browser, ".said"))
    opened(fragment)
    assert (cells(browser), text(browser, ".said")) == before
    browser.execute_script(f"location.hash = '#explore/-/-/all/{urllib.parse.quote(HOSTILE)}'")
    WebDriverWait(browser, 10).until(lambda driver: "onerror" in text(driver, ".path"))
    assert text(browser, "output") == "all 3 positions"
    assert browser.execute_script("return document.activeElement.className").endswith("chosen")


@pytest.mark.parametrize(
    "fragment", ["#explore/float99/no-such-run/token-999999/no.site", "#explore/%E0%A4", "#explore/"]
)
def test_an_address_that_leads_nowhere_shows_the_explorer(opened: Open, fragment: str) -> None:
    browser = opened(fragment)
    assert text(browser, "#explorer-place")
    assert cells(browser)
    assert browser.get_log("browser") == []


def test_sites_that_the_page_names_lead_to_the_explorer(opened: Open) -> None:
    browser = opened()
    links = browser.find_elements("css selector", "#verdict a.to-explorer")
    assert {link.text for link in links} >= {"layers.1"}
    browser.execute_script("document.querySelector('#explorer').scrollIntoView()")
    choose(browser, "logits", "outside the layers")
    browser.execute_script("document.querySelector('#verdict a.to-explorer').click()")
    WebDriverWait(browser, 10).until(lambda driver: text(driver, ".path").startswith("layers.1"))


def test_names_that_would_be_markup_are_text(opened: Open) -> None:
    browser = opened(f"#explore/float32/{RUN}/token-1/{urllib.parse.quote(HOSTILE)}")
    assert text(browser, ".path").startswith(HOSTILE)
    assert browser.title == "A toy"
    assert browser.find_elements("css selector", "#explorer img, #explorer b") == []
    assert browser.get_log("browser") == []


def test_nothing_is_said_on_the_console_and_nothing_is_fetched(opened: Open, page: Path) -> None:
    browser = opened()
    choose(browser, "residual after MLP", "layer 0")
    browser.find_element("css selector", "#explorer [name=dtype][value=side]").click()
    browser.find_element("css selector", ".share button").click()
    drawn(browser)
    assert browser.get_log("browser") == []
    assert requested(browser) == [page.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_nothing(opened: Open, width: int, scheme: str) -> None:
    """On the whole page, with the map of a run, of lengths and side by side, and every table open."""
    lengths, dtypes = f"float16/{LENGTHS}/length-28/layers.0", f"float16/{RUN}/all/layers.0?view=dtypes"
    for fragment in ("", f"#explore/{lengths}", f"#explore/{dtypes}"):
        browser = opened(fragment, width=width, scheme=scheme)
        for summary in browser.find_elements("css selector", ".charts summary"):
            summary.click()
        drawn(browser)
        browser.execute_script(AXE)
        found = browser.execute_async_script(
            "const done = arguments[0]; axe.run(document).then((result) => done(result.violations));"
        )
        assert [(v["id"], v["impact"], [node["html"][:90] for node in v["nodes"]][:3]) for v in found] == []


def test_axe_would_find_something(opened: Open) -> None:
    browser = opened()
    browser.execute_script(
        """
        const box = document.querySelector("#explorer [name=filter]");
        box.placeholder = "";
        box.closest("label").querySelector("span").remove();
        """
    )
    browser.execute_script(AXE)
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run('#explorer').then((result) => done(result.violations.map((v) => v.id)));"
    )
    assert found == ["label"]


@pytest.mark.parametrize("fragment", ["", f"#explore/float16/{LENGTHS}/length-28/layers.0"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_does_not_scroll_sideways(opened: Open, width: int, fragment: str) -> None:
    browser = opened(fragment, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    clipped = browser.execute_script(
        """
        return [...document.querySelectorAll("#explorer .record *")].filter((part) => !part.closest(".scroll, .plot"))
          .filter((part) => part.getBoundingClientRect().right > innerWidth + 0.5)
          .map((part) => part.outerHTML.slice(0, 80));
        """
    )
    assert clipped == []


def test_without_scripts_a_sentence_stands_in_its_place(browser: Any, page: Path) -> None:
    emulate(browser)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit(browser, page.as_uri())
        shown = browser.find_element("css selector", "#explore").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "The explorer needs JavaScript" in shown
    assert "Run" not in shown.splitlines()


def test_print_leaves_it_out(opened: Open) -> None:
    browser = opened()
    emulate(browser, media="print", width=690)
    assert not browser.find_element("css selector", "#explorer").is_displayed()
    assert browser.find_element("css selector", "#explore .on-paper").is_displayed()


def test_a_browser_without_what_it_needs_is_told(browser: Any, page: Path) -> None:
    emulate(browser)
    script = {"source": "delete window.DecompressionStream"}
    known = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    try:
        visit(browser, page.as_uri())
        failed = browser.find_element("css selector", "#explorer-failed")
        WebDriverWait(browser, 10).until(lambda driver: failed.is_displayed())
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", known)
    assert failed.text.startswith("The explorer does not run in this browser")
    assert not browser.find_element("css selector", "#explorer").is_displayed()


def test_the_slider_goes_on_through_the_steps_of_a_generation(browser: Any, tmp_path: Path) -> None:
    """Three tokens in the first step and one in the second, whose value no other position has."""
    first = toy_run("float32", starts=(0, 3), tokens=((2, 7, 9, 9),))
    second = [
        replace(record, step=1, order=record.order + 7, amax=1000.0, maximum=1000.0, minimum=-1.0, shape=(1, 1, 4),
                position_amax=(1000.0,), positions=1, amax_position=3)
        for record in first if record.position_amax
    ]  # fmt: skip
    first.records = [*first.records, *second]
    results = sweep(tmp_path / "sweep", [(run_case("float32", length=4), first)])
    page = write_report("Steps", [SECTIONS["explore"](results)], tmp_path / "report")
    emulate(browser)
    visit(browser, page.as_uri() + "#explore/-/-/all/layers.0")
    ready(browser)
    assert text(browser, "output") == "all 4 positions"
    assert cells(browser)["residual after MLP", "layer 0"] == expected(1000.0)  # the worst of the two steps
    for position, amax in enumerate((200.0, 100.0, 50.0, 1000.0)):
        slide(browser, position + 1)
        assert cells(browser)["residual after MLP", "layer 0"] in about(amax, 0.022)
    assert text(browser, ".path") == "layers.0, operator add, 1 × 1 × 4"
