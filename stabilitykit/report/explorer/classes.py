"""The classes of headroom that the cells of the map have, and their colours."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadroomClass:
    """Headroom of `least` bits and more, up to the next class: its ground and ink on a light and on a dark page.

    A lower class stands out more: darker on a light page, lighter on a dark one. Ink on ground has a contrast of at
    least 4.5 (WCAG 2, AA).
    """

    key: str
    label: str
    least: float
    light: tuple[str, str]
    dark: tuple[str, str]


CLASSES = (
    HeadroomClass("over", "past the maximum", -math.inf, ("#b34700", "#ffffff"), ("#f08a3c", "#1c0f05")),
    HeadroomClass("h0", "under 1 bit", 0, ("#0b3866", "#ffffff"), ("#9bd5ff", "#0a1a28")),
    HeadroomClass("h1", "1 to 2", 1, ("#1f5c97", "#ffffff"), ("#66b5ee", "#0a1a28")),
    HeadroomClass("h2", "2 to 4", 2, ("#3c78b0", "#ffffff"), ("#448fc8", "#04101b")),
    HeadroomClass("h3", "4 to 8", 4, ("#a3c8e4", "#12283c"), ("#2a5d88", "#eef6fc")),
    HeadroomClass("h4", "8 to 16", 8, ("#d3e3f0", "#2a3b4a"), ("#21405a", "#d0dce7")),
    HeadroomClass("h5", "16 bits or more", 16, ("#edf2f6", "#4d5964"), ("#1d2a34", "#a9b3bd")),
)
"""From the least to the most, of one blue, with vermilion past the maximum: an order that colour-blind eyes see too."""
