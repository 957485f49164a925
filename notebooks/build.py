"""Notebooks with their outputs: every percent source beside this file is run in a fresh kernel, written as HTML and as .ipynb.

python notebooks/build.py [--findings] [--out out/notebooks] [NAME ...]

A notebook ends with a text cell "**What was learnt.** On the embedded model:", whose next paragraph is what its last code cell prints.
After a change of the model or the code, `--findings` writes that paragraph anew; `git diff notebooks` shows what changed.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jinja2 import DictLoader
from nbclient import NotebookClient
from nbconvert import HTMLExporter

FOLDER = Path(__file__).parent
# A page has no use for progress bars, nor for the advice to install their widgets.
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
# nbconvert's page without its scripts from the network, which no notebook here needs, and with long lines wrapped at words.
TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block extra_css %}<style>
.jp-Notebook .jp-InputArea .highlight pre, .jp-Notebook .jp-OutputArea-output pre { white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere; }
</style>{% endblock %}
"""
PARAGRAPH = re.compile(r"(?<=\*\*What was learnt\.\*\* On the embedded model:\n#\n)(?:# (?!%%).*\n)+")


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


def printed_findings(notebook: Any) -> str:
    """What the last code cell printed: sentences, one a line; "" if the notebook ends with a text."""
    outputs = notebook.cells[-1].get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout").strip()


def write_findings(source: Path, notebook: Any) -> None:
    """Replaces the findings in a notebook's source, and in the executed notebook, by those that the run printed.

    Raises:
        ValueError: nothing was printed, an empty line was, or the source has no such paragraph, or two.
    """
    printed, text = printed_findings(notebook), source.read_text(encoding="utf-8")
    if not all(line.strip() for line in printed.split("\n")):
        raise ValueError(f"{source.name}: the last cell must print the findings, one a line, got {printed!r}.")
    if (n := len(PARAGRAPH.findall(text))) != 1:
        raise ValueError(f'{source.name}: expected one paragraph after "**What was learnt.** On the embedded model:", found {n}.')
    lines = "".join(f"# {line.rstrip()}\n" for line in printed.split("\n"))
    source.write_text(PARAGRAPH.sub(lambda _: lines, text), encoding="utf-8")
    for cell, now in zip(notebook.cells, jupytext.read(source).cells):
        cell.source = now.source


def write_page(notebook: Any, path: Path) -> None:
    """One HTML file that opens without network, and beside it the notebook, to open in Jupyter, Colab or Kaggle."""
    exporter = HTMLExporter(extra_loaders=[DictLoader({"page.html.j2": TEMPLATE})], template_file="page.html.j2")
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    nbformat.write(notebook, path.with_suffix(".ipynb"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 02 (default: all)")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "out" / "notebooks", help="folder for the pages")
    parser.add_argument("--findings", action="store_true", help="also write what was found into the sources, from what each run printed")
    options = parser.parse_args(arguments)
    wanted = [source for source in SOURCES if not options.names or source.name.startswith(tuple(options.names))]
    if not wanted:
        parser.error(f"there is no such notebook; there are {', '.join(source.stem for source in SOURCES)}.")
    for source in wanted:
        path = options.out / f"{source.stem}.html"
        notebook = execute(source)
        if options.findings:
            write_findings(source, notebook)
        write_page(notebook, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
