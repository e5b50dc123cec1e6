"""Headless Chromium, driven by Selenium, with every request and message logged."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1000"
)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with its profile in a folder of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def emulate(
    browser: Any, *, media: str = "screen", scheme: str = "light", width: int = 1400, height: int = 1000
) -> None:
    """A screen or a printer, light or dark, of this size in CSS pixels. Nothing moves by itself."""
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def visit(browser: Any, address: str) -> None:
    """Opens a page anew, with empty logs."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get("about:blank")
    browser.get(address)


def events(browser: Any, method: str) -> list[Any]:
    """The parameters of each event of that name since the log was read last."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"] for message in messages if message["method"] == method]


def requested(browser: Any) -> list[str]:
    """The addresses that were asked for, without those that hold what they stand for."""
    asked = [event["request"]["url"] for event in events(browser, "Network.requestWillBeSent")]
    return [url for url in asked if not url.startswith("data:") and url != "about:blank"]
