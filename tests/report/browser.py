"""A headless Chromium, driven through chromedriver; nothing is downloaded and nothing of the user's is touched."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "neither Chromium nor its driver is installed (chromium, chromium-driver)"

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One browser with a profile of its own."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        assert DRIVER is not None
        options = Options()
        options.binary_location = CHROMIUM
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # A driver by its path: selenium's manager, which would look for one on the network, is never asked.
        self.driver = Chrome(options=options, service=Service(DRIVER, env={**os.environ, "SE_OFFLINE": "true"}))

    def close(self) -> None:
        """Ends the browser and its driver."""
        self.driver.quit()

    def open(self, page: Path, *, width: int = 1280, dark: bool = False, touch: bool = False) -> None:
        """Loads a page at a width, in light or dark mode."""
        mode = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", media="", features=mode)
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=touch)
        self.driver.get("about:blank")
        self.console(), self.requests()  # what was before is not this page's
        self.driver.get(page.as_uri())

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list[WebElement]:
        """The elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def console(self) -> list[dict[str, Any]]:
        """What the page logged since the last call, errors and refusals by its policy included."""
        return list(self.driver.get_log("browser"))

    def requests(self) -> list[str]:
        """What the page asked for since the last call, by address."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("chrome:", "chrome-"))]  # the browser's own start page


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)
    return value
