"""What a move of the pointer costs on the largest explorer page (1,200 image tokens × 29 layers × top 5), in headless Chromium.

The main thread's own processor time, from Chromium's counters: other load on the machine hardly shows in it. A
picture of 60 a second leaves 16.7 ms.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from browser import chromium, why_not  # the tests' own: `run_all` puts them on the path
from explorer_pages import large
from timing import QUICK, Row, median_interval, report

PARTS = {"TaskDuration": "in all", "ScriptDuration": "script", "LayoutDuration": "layout", "RecalcStyleDuration": "style"}
MOVES = 200


def rows() -> Iterator[Row]:
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page = Path(folder) / "page.html"
        large().page(page)
        size = "1,200 image tokens × 29 layers × top 5"
        yield Row(0, "the explorer page", size, page.stat().st_size / 1e6, "MB", goal="≤ 3")
        browser.open(page, "document.documentElement.dataset.ready")
        browser.sweep(20)
        found: dict[str, list[float]] = {key: [] for key in (*PARTS, "LayoutCount")}
        for _ in range(3 if QUICK else 9):
            before = browser.counters()
            browser.sweep(MOVES)
            after = browser.counters()
            for key, values in found.items():
                values.append((after[key] - before[key]) / MOVES)
        for key, part in PARTS.items():
            goal = "≤ 16.7" if part == "in all" else ""
            yield Row(0, f"a move of the pointer, {part}", size, *_ms(found[key]), goal=goal)
        yield Row(0, "layouts a move", size, *median_interval(found["LayoutCount"])[:1], "")


def _ms(seconds: list[float]) -> tuple[float, str, float, float]:
    value, low, high = median_interval([1000 * second for second in seconds])
    return value, "ms", low, high


if __name__ == "__main__":
    report("explorer", rows)
