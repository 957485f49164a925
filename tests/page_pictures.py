"""Pictures of pages that the commands wrote, for docs/images: `make figures`.

python tests/page_pictures.py out/figures docs/images
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from browser import Browser, chromium

EXPLORER = "document.documentElement.dataset.ready"
# name: page, what holds when it is drawn, what is done before the picture, width
PICTURES = {
    "explorer": ("explore/explorer.html", EXPLORER, "", 1280),
    "explorer_attention": ("explore/explorer.html", EXPLORER, "setMode('attention')", 1280),
    "explorer_patching": ("explore/explorer.html", EXPLORER, "setMode('recovery')", 1280),
    "explorer_photograph": ("photograph/explorer.html", EXPLORER, "setZoom(2, 0.45 * state.width, 0.2 * state.height)", 1280),
    "lens_page": ("lens/lens.html", "document.querySelector('[id^=figure-]')?.textContent.length > 5", "", 1000),
}


def picture(browser: Browser, page: Path, ready: str, script: str, width: int, path: Path) -> None:
    browser.open(page.absolute(), ready, width=width, height=900)
    height = browser.js("return document.documentElement.scrollHeight")
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.frames()
    browser.js(script or "return 0")
    browser.frames()
    browser.frames()
    shot = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    path.write_bytes(base64.b64decode(shot["data"]))


def main(pages: Path, images: Path) -> None:
    with chromium() as browser:
        for name, (page, ready, script, width) in PICTURES.items():
            picture(browser, pages / page, ready, script, width, images / f"{name}.png")
            print(f"wrote {images / name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
