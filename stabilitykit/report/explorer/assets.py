"""What a page with an explorer carries: its styles, its script, the library that draws its curves, and its records."""

import base64
import gzip
from functools import cache
from importlib.resources import files

import jinja2
from markupsafe import Markup

from stabilitykit.report.explorer.classes import CLASSES

UPLOT = "vendor/uPlot-1.6.32"

SCRIPT = ("begin", "words", "records", "map", "record", "curves", "address", "controls")
"""The files of `script/`, in the order in which they make one function."""


def register(environment: jinja2.Environment) -> None:
    """What the explorer's templates use."""
    environment.globals |= {"asset": asset, "headroom_colours": headroom_colours}
    environment.globals |= {"explorer_script": SCRIPT, "uplot": UPLOT}
    environment.filters["packed"] = packed


@cache
def asset(name: str) -> Markup:
    """A file of this folder, to stand in a page as it is."""
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8").strip())


def headroom_colours(scheme: str) -> Markup:
    """The classes' colours as custom properties of CSS, for a `light` or a `dark` page."""
    pairs = {found.key: found.dark if scheme == "dark" else found.light for found in CLASSES}
    return Markup(" ".join(f"--{key}: {ground}; --{key}-ink: {ink};" for key, (ground, ink) in pairs.items()))


def packed(document: str) -> str:
    """Compressed, as letters and digits: a tenth to a third of its size, and nothing in it can be taken for markup."""
    return base64.b64encode(gzip.compress(document.encode(), compresslevel=5, mtime=0)).decode()
