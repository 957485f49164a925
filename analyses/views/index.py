"""The index page of a command's output folder: the command, its printed text, its figures, its tables, and links to its pages."""

from __future__ import annotations

import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_ROWS = 20
_PICTURES, _PAGES = (".png", ".svg", ".jpg"), (".html",)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ --page: #fff; --ink: #1a1a1a; --quiet: #5f6368; --line: #d9dce0; --soft: #f3f4f6; --link: #00568a; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #15171a; --ink: #e8e8e6; --quiet: #a0a5ab; --line: #363b41; --soft: #202429; --link: #7cc4f5; }}
}}
body {{ font: 15px/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; margin: 1.5rem auto 3rem; max-width: 72rem;
       padding: 0 1rem; color: var(--ink); background: var(--page); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem; }} a {{ color: var(--link); }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }} dt {{ color: var(--quiet); }} dd {{ margin: 0; }}
pre {{ background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem; overflow-x: auto;
      font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; overflow-wrap: normal; }}
figure {{ margin: 1.2rem 0; }} figure img {{ max-width: 100%; height: auto; display: block; background: #fff; }}
figcaption, summary small {{ color: var(--quiet); font-size: .85rem; }}
summary {{ cursor: pointer; min-height: 1.8rem; }} .table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ padding: .1rem .7rem .1rem 0; text-align: left; white-space: pre; border-bottom: 1px solid var(--line); }}
</style></head><body>
<h1>{title}</h1>
<pre class="command">{command}</pre>
{body}
</body></html>
"""


def index_page(title: str, command: str, about: Mapping[str, Any], said: str, files: Sequence[Path]) -> str:
    """The HTML of the page; it refers to pictures and pages in the same folder by name.

    Args:
        title: the command's name; command: the whole command line.
        about: name -> value, such as the question and the answer.
        said: the text that the command printed.
        files: the files that it wrote, at their current paths.
    """
    shown = {name.replace("_", " "): _text(value) for name, value in about.items() if value not in (None, "", [])}
    body = ["<dl>" + "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in shown.items()) + "</dl>"]
    if pages := [file for file in files if file.suffix in _PAGES]:
        body.append("<h2>Pages</h2><p>" + " · ".join(_link(file) for file in pages) + "</p>")
    if said.strip():
        body.append(f"<h2>Findings</h2><pre>{html.escape(said.strip(chr(10)))}</pre>")
    pictures = [file for file in files if file.suffix in _PICTURES]
    body += [f"<h2>Pictures</h2>{''.join(map(_figure, pictures))}"] if pictures else []
    tables = [file for file in files if file.suffix == ".csv"]
    body += [f"<h2>Tables</h2>{''.join(map(_table, tables))}"] if tables else []
    if others := [file for file in files if file.suffix not in (*_PAGES, *_PICTURES, ".csv")]:
        body.append("<h2>Other files</h2><p>" + " · ".join(_link(file) for file in others) + "</p>")
    return _PAGE.format(title=html.escape(title), command=html.escape(command), body="\n".join(body))


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _link(file: Path, text: str | None = None) -> str:
    name = html.escape(file.name)
    return f'<a href="{name}">{html.escape(text) if text else name}</a>'


def _figure(file: Path) -> str:
    name = html.escape(file.name)
    words = html.escape(file.stem.replace("_", " "))
    return f'<figure><a href="{name}"><img src="{name}" alt="{words}"></a><figcaption>{name}</figcaption></figure>'


def _table(file: Path) -> str:
    """A collapsed section with the first rows of a table."""
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        rows = list(csv.reader(opened))
    if not rows:
        return f"<p>{_link(file)}, empty</p>"
    head, body = rows[0], rows[1:]
    cells = ["<tr>" + "".join(f"<{tag}>{html.escape(_cell(cell))}</{tag}>" for cell in row) + "</tr>"
             for tag, row in (("th", head), *(("td", row) for row in body[:MOST_ROWS]))]  # fmt: skip
    n = f"{len(body)} rows" if len(body) <= MOST_ROWS else f"the first {MOST_ROWS} of {len(body)} rows"
    inside = f'<div class="table"><table>{"".join(cells)}</table></div>'
    return (
        f"<details><summary>{html.escape(file.name)} <small>{n}</small></summary><p>{_link(file, 'the whole table')}</p>{inside}</details>"
    )


def _cell(text: str) -> str:
    """A cell: numbers with a decimal point to four digits, texts cut to 60 characters."""
    try:
        return f"{float(text):.4g}" if "." in text else text
    except ValueError:
        return text if len(text) <= 60 else f"{text[:59]}…"
