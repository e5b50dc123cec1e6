"""A page as PDF, printed by a browser of the machine's that runs without a window."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from stabilitykit.errors import MisuseError, StabilityKitError
from stabilitykit.files import cannot_write, written_beside

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
)
"""Names under which browsers that print to PDF are installed."""

_SECONDS = 180  # a report takes two to five


def find_browser() -> Path:
    """The first of BROWSERS that is on the PATH; raises MisuseError where none of them is."""
    for name in BROWSERS:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise MisuseError(
        f"A PDF is printed by a browser, and none is on the PATH: looked for {', '.join(BROWSERS)}. Install Chromium, "
        "Chrome or Edge, or open report.html in any browser and print it."
    )


def print_page(page: Path, pdf: Path, browser: Path) -> None:
    """Prints the page on A4. `pdf` is written completely or not at all.

    Raises StabilityKitError where the browser fails or takes minutes, and MisuseError where `pdf` cannot be written.
    """
    try:
        with written_beside(pdf) as aside, tempfile.TemporaryDirectory() as profile:
            said = _run(browser, page, aside, Path(profile))
            made = aside.read_bytes()
            if not made.startswith(b"%PDF-") or b"%%EOF" not in made[-1024:]:
                raise StabilityKitError(
                    f"{browser} made no PDF of {page}. It said: {said or 'nothing'}. Open the page in a browser and "
                    "print it."
                )
    except OSError as error:
        raise cannot_write(pdf, error) from None


def _run(browser: Path, page: Path, pdf: Path, profile: Path) -> str:
    """Runs the browser and returns the last line of what it says."""
    command = [
        str(browser), "--headless", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--no-pdf-header-footer", f"--user-data-dir={profile}",
        f"--print-to-pdf={pdf.resolve()}",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")  # Chromium's own sandbox refuses to start as root; the page is ours
    try:
        done = subprocess.run(
            [*command, page.resolve().as_uri()], capture_output=True, text=True, errors="replace", timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StabilityKitError(
            f"{browser} did not print {page} in {_SECONDS} seconds. Open the page in a browser and print it."
        ) from None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else ""
