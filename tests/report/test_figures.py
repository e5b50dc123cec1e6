import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from stabilitykit.report.blocks import Figure, Hover
from stabilitykit.report.figures import draw, inline
from stabilitykit.report.style import FAINT, INK, PAPER

SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_the_same_figure_gives_the_same_bytes(heat: Figure, lines: Figure) -> None:
    assert draw(heat) == draw(heat)
    assert draw(lines) == draw(lines)


def test_files_are_opaque_and_white_at_150_dots_an_inch(heat: Figure) -> None:
    drawing = draw(heat)
    image = Image.open(io.BytesIO(drawing.png))
    assert image.size == (900, 450)
    assert np.asarray(image.convert("RGBA"))[..., 3].min() == 255
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert drawing.svg.startswith("<?xml")
    root = ElementTree.fromstring(drawing.svg)
    assert root.find(f"{SVG}title").text == heat.title
    assert root.find(f"{SVG}desc").text == heat.alt
    assert "fill: #ffffff" in drawing.svg


def test_in_the_page_ink_is_the_pages_and_the_ground_transparent(lines: Figure) -> None:
    text = inline(lines, draw(lines).svg)
    assert not any(colour in text for colour in (INK, FAINT, PAPER, "#ffffff", "<style", "<metadata"))
    assert "currentColor" in text
    assert "var(--faint)" in text


@pytest.mark.parametrize("kind", ["svg", "inline"])
def test_text_stays_text(lines: Figure, kind: str) -> None:
    drawing = draw(lines)
    root = ElementTree.fromstring(drawing.svg) if kind == "svg" else parsed(inline(lines, drawing.svg))
    words = {"".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")}
    assert {"layer", "amax", "float16", "bfloat16", "float16 maximum, 65,504", "10⁵"} <= words


def test_an_inline_figure_is_an_image_with_a_description(lines: Figure) -> None:
    root = parsed(inline(lines, draw(lines).svg))
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'rising "lines"'
    assert root.get("viewBox") == "0 0 432 216"


def test_ids_of_two_figures_never_meet_and_every_reference_is_kept(heat: Figure) -> None:
    first, second = (inline(block, draw(block).svg) for block in (heat, replace(heat, name="other")))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, known in zip((first, second), ids, strict=True):
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
        assert used
        assert {a or b for a, b in used} <= known


def test_hover_rectangles_lie_where_the_data_are() -> None:
    def square(canvas: Canvas) -> list[Hover]:
        canvas.set_layout_engine("none")
        axes = canvas.add_axes((0.25, 0.5, 0.5, 0.25))  # of a 4 × 2 inch figure: 72 to 216 wide, 36 to 72 from the top
        axes.set(xlim=(0, 10), ylim=(0, 4))
        return [
            Hover(left=0, right=5, bottom=0, top=1, text="low left & <first>"),
            Hover(left=9, right=99, bottom=2, top=4, text="cut"),
            Hover(left=20, right=30, bottom=0, top=1, text="outside"),
        ]

    block = Figure(name="f", title="", caption="", alt="", draw=square, size=(4, 2))
    root = parsed(inline(block, draw(block).svg))
    (group,) = [part for part in root.iter(f"{SVG}g") if part.get("class") == "hover"]
    found = [(*(float(r.get(k, "")) for k in ("x", "y", "width", "height")), r[0].text) for r in group]
    assert found == [(72, 63, 72, 9, "low left & <first>"), (201.6, 36, 14.4, 18, "cut")]


def test_hovers_of_a_figure_with_a_layout_match_the_axes_in_the_svg(heat: Figure) -> None:
    """The rectangles of a 2 × 3 map tile exactly the image that matplotlib placed."""
    root = parsed(inline(heat, draw(heat).svg))
    (group,) = [part for part in root.iter(f"{SVG}g") if part.get("class") == "hover"]
    boxes = np.array([[float(r.get(k, "")) for k in ("x", "y", "width", "height")] for r in group])
    assert len(boxes) == 6
    clip = next(root.iter(f"{SVG}clipPath"))[0]
    left, top, width, height = (float(clip.get(key, "")) for key in ("x", "y", "width", "height"))
    assert boxes[:, 0].min() == pytest.approx(left, abs=0.02)
    assert boxes[:, 1].min() == pytest.approx(top, abs=0.02)
    assert (boxes[:, 0] + boxes[:, 2]).max() == pytest.approx(left + width, abs=0.02)
    assert (boxes[:, 1] + boxes[:, 3]).max() == pytest.approx(top + height, abs=0.02)


def test_drawing_leaves_matplotlibs_settings_alone(lines: Figure) -> None:
    before = dict(matplotlib.rcParams)
    draw(lines)
    assert dict(matplotlib.rcParams) == before


def test_a_users_own_settings_do_not_show(lines: Figure) -> None:
    expected = draw(lines)
    with matplotlib.rc_context({"lines.linewidth": 9, "savefig.dpi": 10, "axes.facecolor": "pink"}):
        assert draw(lines) == expected
