"""circuitsvis on one self-contained page.

circuitsvis loads its JavaScript from a network, or inlines 1.3 MB of it a figure; here it is inlined once
and called for every figure. Tokens are text: what would be markup is escaped, for circuitsvis renders it.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }} p {{ color: #555; }}
.row {{ display: grid; grid-template-columns: 6rem 1fr; align-items: center; }}
.row > span {{ color: #555; font-variant-numeric: tabular-nums; }}
</style></head><body>
<h1>{title}</h1>
{body}
<script>{library}</script>
<script>
{calls}
</script></body></html>
"""


class Page:
    """Headings and circuitsvis figures, written as one file."""

    def __init__(self, title: str):
        self.title, self.body, self.calls = title, [], []

    def heading(self, text: str, explanation: str = "") -> None:
        self.body.append(f"<h2>{html.escape(text)}</h2>" + (f"<p>{html.escape(explanation)}</p>" if explanation else ""))

    def figure(self, component: str, label: str = "", **props: Any) -> None:
        """A circuitsvis component (`ColoredTokens`, `TokenLogProbs`, …) with its own props; see their `render`."""
        name = f"figure-{len(self.calls)}"
        box = f'<div id="{name}"></div>'
        self.body.append(f'<div class="row"><span>{html.escape(label)}</span>{box}</div>' if label else box)
        self.calls.append(f'CircuitsVis.render("{name}", CircuitsVis.{component}, {as_json(props)});')

    def write(self, path: str | Path) -> None:
        library = files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
        page = _PAGE.format(
            title=html.escape(self.title),
            body="\n".join(self.body),
            library=library.replace("</script>", "<\\/script>"),
            calls="\n".join(self.calls),
        )
        Path(path).write_text(page, encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that cannot end the script it stands in."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c")


def as_text(token: str) -> str:
    """A token as circuitsvis should show it: escaped (it renders markup), blanks and controls visible."""
    shown = "".join("␣" if c == " " else "⏎" if c == "\n" else c if c.isprintable() else "�" for c in token)
    return html.escape(shown or "∅")


def lens_page(lens: Any, path: str | Path) -> None:
    """A logit lens, interactively: hover a layer for its top tokens; rows of top tokens coloured by probability."""
    page = Page(f"Logit lens, {lens.model_name}")
    for index, position in enumerate(lens.positions):
        answer = as_text(lens.top_tokens[-1][index][0])
        page.heading(
            f"Top tokens by layer at position {position} ({html.unescape(as_text(lens.prompt_tokens[index]))})",
            f"Hover an entry of the residual stream. Colour: log-probability of the final top token "
            f"{html.unescape(answer)}.",
        )
        page.figure(
            "TokenLogProbs",
            prompt=["", *lens.layer_labels],  # the component leaves out a first token
            topKLogProbs=lens.top_probs[:, index].log().tolist(),
            topKTokens=[[as_text(token) for token in layer[index]] for layer in lens.top_tokens],
            correctTokenRank=lens.final_ranks[:, index].tolist(),
            correctTokenLogProb=lens.final_probs[:, index].log().tolist(),
        )
    page.heading("Top token of every layer", "One row an entry, one token a position; colour: its probability, 0 to 1.")
    for layer, label in reversed(list(enumerate(lens.layer_labels))):
        page.figure(
            "ColoredTokens",
            label=label,
            tokens=[as_text(tokens[0]) for tokens in lens.top_tokens[layer]],
            values=lens.top_probs[layer, :, 0].tolist(),
            minValue=0,
            maxValue=1,
        )
    page.write(path)
