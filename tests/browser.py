"""A headless Chromium that records every request it makes; Debian's `chromium` and `chromium-driver`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCAL = ("file:", "blob:", "data:", "about:", "chrome:", "devtools:")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")

_SWEEP = """
const [moves, done] = arguments, map = document.querySelector("#map"), box = map.getBoundingClientRect(), { rows, cols } = data.images[0];
let move = 0;
(function next() {
  if (move === moves) return done();
  const [row, col] = [(7 * move + 3) % rows, (11 * move + 5) % cols];
  const [clientX, clientY] = [box.left + ((col + 0.5) * box.width) / cols, box.top + ((row + 0.5) * box.height) / rows];
  map.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, pointerType: "mouse", clientX, clientY }));
  move += 1;
  requestAnimationFrame(() => requestAnimationFrame(next));
})();
"""


def why_not() -> str | None:
    """Why no browser can be driven here, or None where one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install -e '.[dev]')"
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found (apt-get install chromium chromium-driver)" if missing else None


class Browser:
    """One tab, driven by scripts, the pointer and keys."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, path: Path, ready: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a file and waits until the expression `ready` holds."""
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # what is in them is of the page before
        self.driver.get(path.as_uri())
        self.wait(ready)

    def wait(self, expression: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"return Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}; {self.errors()}"
            time.sleep(0.05)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def keys(self, selector: str, *keys: str) -> None:
        self.driver.find_element("css selector", selector).send_keys(*keys)
        self.frames()

    def hover(self, selector: str, x: float, y: float) -> None:
        """Moves the pointer over an element, to a share of its width and height."""
        from selenium.webdriver import ActionChains

        element = self.driver.find_element("css selector", selector)
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        offset = [round((share - 0.5) * element.size[side]) for share, side in ((x, "width"), (y, "height"))]
        ActionChains(self.driver, duration=0).move_to_element_with_offset(element, *offset).perform()
        self.frames()

    def counters(self) -> dict[str, float]:
        """Counts (LayoutCount, RecalcStyleCount, …) and seconds of the main thread's own time (TaskDuration, …) so far."""
        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        return {metric["name"]: metric["value"] for metric in self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}

    def sweep(self, moves: int) -> None:
        """Moves the pointer over the explorer's image so many times, from token to token, each drawn before the next."""
        self.driver.execute_async_script(_SWEEP, moves)

    def frames(self) -> None:
        """Until what was asked for is drawn."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def requests_that_left(self) -> list[str]:
        """Addresses asked for since the page was opened that are not on this machine."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert asked, "the browser recorded no request at all, not even of the page"
        return [url for url in asked if not url.startswith(LOCAL)]

    def errors(self) -> list[str]:
        """What the page's console holds of errors."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def chromium() -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium")
    for option in _OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
