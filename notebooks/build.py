"""Notebooks with their outputs: every percent source beside this file is run in a fresh kernel and written as HTML.

python notebooks/build.py [--out out/notebooks] [NAME ...]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient
from nbconvert import HTMLExporter

FOLDER = Path(__file__).parent
# A page has no use for progress bars, nor for the advice to install their widgets.
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))


def execute(source: Path, timeout: int = 600) -> Any:
    """The notebook with its outputs.

    Args:
        timeout: seconds a cell may take.
    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds the cell and its traceback.
    """
    notebook = jupytext.read(source)
    place = {"metadata": {"path": str(source.parent)}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=place).execute(env=os.environ | QUIET)
    return notebook


def write_page(notebook: Any, path: Path) -> None:
    """One HTML file."""
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 02 (default: all)")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "out" / "notebooks", help="folder for the pages")
    options = parser.parse_args()
    wanted = [source for source in SOURCES if not options.names or source.name.startswith(tuple(options.names))]
    if not wanted:
        parser.error(f"there is no such notebook; there are {', '.join(source.stem for source in SOURCES)}.")
    for source in wanted:
        path = options.out / f"{source.stem}.html"
        write_page(execute(source), path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
