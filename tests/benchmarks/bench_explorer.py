"""What a move of the pointer costs on the largest explorer page (1,200 image tokens × 29 entries × top 5), in headless Chromium.

    python tests/benchmarks/bench_explorer.py [MOVES]

The main thread's own processor time a move, from Chromium's counters: other load on the machine hardly shows in it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser import chromium, why_not
from explorer_pages import large

PARTS = {"TaskDuration": "all", "ScriptDuration": "script", "LayoutDuration": "layout", "RecalcStyleDuration": "style"}


def main(moves: int = 200, rounds: int = 5) -> None:
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page = Path(folder) / "page.html"
        large().page(page)
        print(f"page: {page.stat().st_size / 1e6:.2f} MB")
        browser.open(page, "document.documentElement.dataset.ready")
        browser.sweep(20)
        for _ in range(rounds):
            before = browser.counters()
            browser.sweep(moves)
            after = browser.counters()
            cost = {name: 1000 * (after[key] - before[key]) / moves for key, name in PARTS.items()}
            layouts = (after["LayoutCount"] - before["LayoutCount"]) / moves
            print(", ".join(f"{name} {ms:.2f} ms" for name, ms in cost.items()) + f"; {layouts:.2f} layouts a move")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
