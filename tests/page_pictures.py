"""Pictures for docs/images of what the commands wrote: of pages, as a browser shows them, and photographs as JPEG: `make figures`.

python tests/page_pictures.py out/figures docs/images
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from browser import Browser, chromium
from PIL import Image

EXPLORER = "document.documentElement.dataset.ready"
# name: page, what holds when it is drawn, what is done before the picture, width
PICTURES = {
    "explorer.png": ("explore/explorer.html", EXPLORER, "", 1280),
    "explorer_attention.jpg": ("photograph/explorer.html", EXPLORER, "setMode('attention')", 1280),
    "explorer_patching.jpg": ("explore/explorer.html", EXPLORER, "setMode('recovery')", 1280),
    "photographs/explorer.jpg": ("photograph/explorer.html", EXPLORER, "setZoom(2, 0.45 * state.width, 0.2 * state.height)", 1280),
    "photographs/circuits.jpg": ("photograph_lens/lens.html", "document.querySelector('[id^=figure-]')?.textContent.length > 5", "", 1000),
}
COPIES = {"photographs/lens.jpg": "photograph_lens/lens_image.png", "photographs/ground.jpg": "ground/grounding.png"}
WIDTH = 1400  # of a JPEG, in pixels, at most


def picture(browser: Browser, page: Path, ready: str, script: str, width: int, path: Path) -> None:
    browser.open(page.absolute(), ready, width=width, height=900)
    browser.js(script or "return 0")
    browser.frames()
    browser.js("document.documentElement.style.scrollbarWidth = 'none'")
    for _ in range(2):  # a taller window may make a taller page
        height = browser.js("return document.documentElement.scrollHeight")
        browser.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        )
        browser.frames()
    browser.frames()
    shot = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    keep(Image.open(io.BytesIO(base64.b64decode(shot["data"]))), path)


def keep(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        image = image.convert("RGB")
        image.thumbnail((WIDTH, 4 * WIDTH))
        image.save(path, quality=85)
    else:
        image.save(path)
    print(f"wrote {path}")


def main(pages: Path, images: Path) -> None:
    with chromium() as browser:
        for name, (page, ready, script, width) in PICTURES.items():
            picture(browser, pages / page, ready, script, width, images / name)
    for name, source in COPIES.items():
        keep(Image.open(pages / source), images / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
