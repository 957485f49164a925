"""circuitsvis figures on one self-contained page.

circuitsvis itself loads its JavaScript from the network or inlines 1.3 MB of it for every figure; here it is inlined once per
page. Tokens are escaped, because circuitsvis renders markup in them. A prompt has too many image tokens for it
(`attention_patterns` does not finish with 600), so `strip` pools them, for the whole image or in named groups.

    shown = strip(tokens, inputs.segments[0], groups={"circle": inputs.positions(box)})
    page = Page("Attention")
    page.attention_heads(cache["pattern", 3][0], shown)
    page                     # in a notebook, with or without network; page.write("page.html") for a file
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from matplotlib.colors import to_hex, to_rgb
from torch import Tensor

from analyses.views.text import cut, readable
from hooked_qwen2vl.files import whole_file
from hooked_qwen2vl.moved import renamed_arguments

MOST_TOKENS = 128  # in an attention figure: circuitsvis takes a minute for 300 tokens and does not finish with 600
MOST_NUMBERS = 2_000_000  # in one figure: about 20 MB of the page
_SHADE = "#56b4e9"  # of probability 1; black text is legible on it and on all paler ones
_POOLED = ("image[", "video[")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<meta name="color-scheme" content="light dark">
<style>
:root {{ --page: #fff; --ink: #1b1b1b; --quiet: #555; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #15171a; --ink: #e8e8e6; --quiet: #a8adb3; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem;
       color: var(--ink); background: var(--page); }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin: 1.4rem 0 .3rem; }} p {{ color: var(--quiet); margin: .2rem 0 .5rem; }}
.row {{ display: grid; grid-template-columns: 6rem 1fr; align-items: center; }}
.row > span {{ color: var(--quiet); font-variant-numeric: tabular-nums; }}
[id^=figure-] {{ color: #1b1b1b; background: #fff; color-scheme: light; overflow-x: auto; padding: 0 .2rem; }} /* circuitsvis is drawn for white */
.row [id^=figure-] {{ width: fit-content; max-width: 100%; box-sizing: border-box; font-family: ui-monospace, "DejaVu Sans Mono", monospace; }}
.pictures {{ display: flex; flex-wrap: wrap; gap: .6rem; }} .pictures img {{ max-height: 12rem; max-width: 100%; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: separate; border-spacing: 1px; font-size: 13px; font-variant-numeric: tabular-nums; }}
th {{ font-weight: normal; color: var(--quiet); text-align: right; padding-right: .5rem; white-space: nowrap; }} thead th {{ text-align: left; }}
td {{ padding: .05rem .4rem; white-space: pre; }} td small {{ float: right; margin-left: .8rem; font-size: 12px; }}
</style></head><body>
<h1>{title}</h1>
{body}
<script>{library}</script>
<script>
{calls}
</script></body></html>
"""


@dataclass(frozen=True)
class Strip:
    """The tokens that a figure shows of a prompt; a shown token is one position, or several that are pooled.

    Attributes:
        tokens: the shown tokens, as plain text.
        members: for each, its positions in the prompt.
    """

    tokens: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def values(self, values: Float[Tensor, "pos ..."], pool: Literal["mean", "max", "sum"] = "mean") -> Float[Tensor, "shown ..."]:
        """One value for each shown token, pooled over its positions.

        Raises:
            ValueError: fewer positions than the strip needs.
        """
        self._check(values.shape[0])
        reduce = {"mean": torch.mean, "max": torch.amax, "sum": torch.sum}[pool]
        return torch.stack([reduce(values[list(places)].float(), dim=0) for places in self.members])

    def attention(self, pattern: Float[Tensor, "... pos key_pos"]) -> Float[Tensor, "... shown shown"]:
        """Attention between shown tokens: the sum over the positions of a key, the mean over the positions of a query.

        Rows sum to 1 if all attended positions are shown.
        """
        self._check(pattern.shape[-1])
        keys = torch.stack([pattern[..., list(places)].float().sum(-1) for places in self.members], dim=-1)
        return torch.stack([keys[..., list(places), :].mean(-2) for places in self.members], dim=-2)

    def _check(self, n: int) -> None:
        needed = 1 + max(max(places) for places in self.members)
        if n < needed:
            raise ValueError(f"expected values of the whole prompt, of {needed} positions at least, got {n}.")


@renamed_arguments
def strip(
    tokens: Sequence[str],
    segments: Sequence[str],
    groups: Mapping[str, Sequence[int]] | None = None,
    only: Sequence[str] | None = None,
    pool: bool = True,
) -> Strip:
    """Chooses the tokens that a figure shows of a prompt.

    Args:
        tokens: the text of every position; segments: the segment of every position (`inputs.segments[row]`). Padding is left out.
        groups: label -> image token positions that are pooled on their own, such as those of an object; the other positions of
            the image are pooled as "rest of image[0]".
        only: names of the segments to show; None: all.
        pool: False shows every image token on its own.
    Raises:
        ValueError: tokens and segments of different lengths, groups that overlap or have positions outside an image, or nothing to
            show.
    """
    if len(tokens) != len(segments):
        raise ValueError(f"expected a segment for each of {len(tokens)} tokens, got {len(segments)}.")
    of = _group_of(groups or {}, segments)
    shown: dict[Any, list[int]] = {}
    for place, name in enumerate(segments):
        if name == "padding" or (only is not None and name not in only):
            continue
        pooled = pool and name.startswith(_POOLED)
        key = ("group", of[place]) if place in of else ("segment", name) if pooled else ("token", place)
        shown.setdefault(key, []).append(place)
    if not shown:
        raise ValueError(f"nothing to show: the segments are {', '.join(dict.fromkeys(segments))}.")
    labels = [_label(kind, what, places, tokens, segments, of) for (kind, what), places in shown.items()]
    return Strip(tuple(labels), tuple(map(tuple, shown.values())))


def _group_of(groups: Mapping[str, Sequence[int]], segments: Sequence[str]) -> dict[int, str]:
    of: dict[int, str] = {}
    for label, places in groups.items():
        for place in map(int, places):
            if not 0 <= place < len(segments) or not segments[place].startswith(_POOLED):
                raise ValueError(f"the group {label!r} has position {place}, which is no image token.")
            if place in of:
                raise ValueError(f"position {place} is in the groups {of[place]!r} and {label!r}.")
            of[place] = label
    return of


def _label(kind: str, what: Any, places: list[int], tokens: Any, segments: Sequence[str], of: Mapping[int, str]) -> str:
    if kind == "token":
        return tokens[what]
    if kind == "segment" and any(segments[place] == what for place in of):
        what = f"rest of {what}"
    return f"[{what} ×{len(places)}]"


class Page:
    """Headings and circuitsvis figures, written as one file or shown in a notebook."""

    def __init__(self, title: str):
        self.title, self.body, self.calls = title, [], []

    def heading(self, text: str, explanation: str = "") -> None:
        self.body.append(f"<h2>{html.escape(text)}</h2>" + (f"<p>{html.escape(explanation)}</p>" if explanation else ""))

    def pictures(self, images: Sequence[Any]) -> None:
        """Images side by side, at most 600 pixels large."""
        self.body.append('<div class="pictures">' + "".join(map(_picture, images)) + "</div>")

    def figure(self, component: str, label: str = "", **props: Any) -> None:
        """A circuitsvis component (`ColoredTokens`, `TokenLogProbs`, …) with its own props; see their `render`."""
        name = f"figure-{len(self.calls)}"
        box = f'<div id="{name}"></div>'
        self.body.append(f'<div class="row"><span>{html.escape(label)}</span>{box}</div>' if label else box)
        self.calls.append(f'CircuitsVis.render("{name}", CircuitsVis.{component}, {as_json(props)});')

    def attention_patterns(self, pattern: Float[Tensor, "head pos key_pos"], shown: Strip) -> None:
        """All heads as small maps, with the tokens to hover over.

        Raises:
            ValueError: more than MOST_TOKENS tokens.
        """
        self.figure("AttentionPatterns", tokens=_texts(shown), attention=_attention(pattern, shown))

    def attention_heads(self, pattern: Float[Tensor, "head pos key_pos"], shown: Strip, names: Sequence[str] | None = None) -> None:
        """A small map for each head, and a large one for the chosen head; long tokens are cut. `names` label the heads.

        Raises:
            ValueError: more than MOST_TOKENS tokens.
        """
        labels = [f"head {head}" for head in range(len(pattern))] if names is None else list(names)
        self.figure(
            "AttentionHeads",
            tokens=[cut(readable(token), 16) for token in shown.tokens],  # this component draws on a canvas, so nothing is escaped
            attention=_attention(pattern, shown),
            attentionHeadNames=[html.escape(label) for label in labels],
            maxValue=1,
            minValue=0,
        )

    def colored_tokens(
        self,
        values: Float[Tensor, "pos"],
        shown: Strip,
        label: str = "",
        low: float | None = None,
        high: float | None = None,
        pool: Literal["mean", "max", "sum"] = "mean",
    ) -> None:
        """Tokens coloured by a value: negative red, positive blue; `low` and `high` are the ends of the scale."""
        reduced = shown.values(values, pool)
        low, high = float(reduced.min()) if low is None else low, float(reduced.max()) if high is None else high
        self.figure("ColoredTokens", label, tokens=_texts(shown), values=reduced.tolist(), minValue=low, maxValue=high)

    def topk_tokens(
        self,
        activations: Float[Tensor, "pos layer neuron"],
        shown: Strip,
        k: int = 10,
        layers: Sequence[str] | None = None,
        pool: Literal["mean", "max"] = "max",
    ) -> None:
        """The tokens with the highest and lowest activations of a neuron; the reader chooses layer and neuron.

        Raises:
            ValueError: more than MOST_NUMBERS numbers.
        """
        values = shown.values(activations, pool).movedim(0, 1)  # [layer shown neuron]
        k = min(k, len(shown))
        _check_size(values.shape[0] * values.shape[2] * 4 * k)
        top, bottom = values.topk(k, dim=1), values.topk(k, dim=1, largest=False)
        self.figure(
            "TopkTokens",
            tokens=[_texts(shown)],
            topkVals=[top.values.tolist()],
            topkIdxs=[top.indices.tolist()],
            bottomkVals=[bottom.values.flip(1).tolist()],
            bottomkIdxs=[bottom.indices.flip(1).tolist()],
            firstDimensionName="Layer",
            thirdDimensionName="Neuron",
            **cast(Any, {} if layers is None else {"firstDimensionLabels": list(layers)}),
        )

    def neuron_activations(
        self,
        activations: Float[Tensor, "pos layer neuron"],
        shown: Strip,
        layers: Sequence[str] | None = None,
        neurons: Sequence[str] | None = None,
        pool: Literal["mean", "max"] = "max",
    ) -> None:
        """Tokens coloured by a neuron's activation; the reader chooses layer and neuron.

        Raises:
            ValueError: more than MOST_NUMBERS numbers: pass fewer neurons.
        """
        values = shown.values(activations, pool)
        _check_size(values.numel())
        labels = {"firstDimensionLabels": layers, "secondDimensionLabels": neurons}
        self.figure(
            "TextNeuronActivations",
            tokens=_texts(shown),
            activations=values.tolist(),
            firstDimensionName="Layer",
            secondDimensionName="Neuron",
            **cast(Any, {key: list(names) for key, names in labels.items() if names is not None}),
        )

    def token_log_probs(
        self,
        log_probs: Float[Tensor, "pos d_vocab"],
        token_ids: Int[Tensor, "pos"],
        to_string: Callable[[int], str],
        shown: Strip,
        top_k: int = 10,
    ) -> None:
        """Text tokens coloured by the log-probability that the model gave them; hovering shows the top predictions.

        The first token of the prompt and pooled tokens are left out, because the model does not predict them.

        Args:
            log_probs: of the next token at each position, nats. token_ids: of the prompt. to_string: the text of one id.
        Raises:
            ValueError: no token is left.
        """
        places = [members[0] for members in shown.members if len(members) == 1 and members[0] > 0]
        if not places:
            raise ValueError("no token to show was predicted: the strip has pooled tokens or a first token only.")
        before, true = log_probs[[place - 1 for place in places]].float().cpu(), token_ids[places].cpu()
        top, own = before.topk(top_k, dim=-1), before.gather(-1, true[:, None])
        self.figure(
            "TokenLogProbs",
            prompt=["", *(as_text(to_string(int(token))) for token in true)],  # the component does not draw the first token
            topKLogProbs=top.values.tolist(),
            topKTokens=[[as_text(to_string(token)) for token in row] for row in top.indices.tolist()],
            correctTokenRank=(before > own).sum(-1).tolist(),
            correctTokenLogProb=own[:, 0].tolist(),
        )

    def html(self) -> str:
        """The HTML of the page."""
        library = files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
        return _PAGE.format(
            title=html.escape(self.title),
            body="\n".join(self.body),
            library=library.replace("</script>", "<\\/script>"),
            calls="\n".join(self.calls),
        )

    def write(self, path: str | Path) -> None:
        with whole_file(path) as file:
            file.write_text(self.html(), encoding="utf-8", errors="backslashreplace")

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame that grows with its content; needs no network."""
        grow = "const f=this,d=f.contentDocument.body;new ResizeObserver(()=>f.style.height=d.scrollHeight+40+'px').observe(d)"
        return f'<iframe srcdoc="{html.escape(self.html())}" onload="{grow}" style="width:100%;height:400px;border:0"></iframe>'


def _attention(pattern: Float[Tensor, "head pos key_pos"], shown: Strip) -> list:
    if len(shown) > MOST_TOKENS:
        raise ValueError(
            f"{len(shown)} tokens are more than circuitsvis draws ({MOST_TOKENS}): pool the image tokens, or pass only= to "
            f"strip; for attention on the image itself see analyses.views.attention."
        )
    return shown.attention(pattern).tolist()


def _check_size(n: int) -> None:
    if n > MOST_NUMBERS:
        raise ValueError(f"{n:,} numbers are too many for one figure ({MOST_NUMBERS:,}): pass fewer layers or neurons.")


def _texts(shown: Strip) -> list[str]:
    return [as_text(token) for token in shown.tokens]


def as_json(value: Any) -> str:
    """JSON that is safe inside a <script> element."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c")


def as_text(token: str) -> str:
    """A token for circuitsvis: spaces and control characters made visible, markup escaped."""
    return html.escape(readable(token))


def _picture(image: Any) -> str:
    shown, data = image.convert("RGB"), io.BytesIO()
    shown.thumbnail((600, 600))
    shown.save(data, "png")
    return f'<img alt="the image" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode("ascii")}">'


def lens_page(lens: Any, path: str | Path | None = None, images: Sequence[Any] = ()) -> Page:
    """A page for a logit lens: a table of the top tokens by layer for each position, then rows of top tokens for each layer.

    Args:
        path: a file to write. images: of the prompt, shown at the top.
    """
    page = Page(f"Logit lens, {lens.model_name}")
    if images:
        page.pictures(images)
    for index, position in enumerate(lens.positions):
        final = readable(lens.top_tokens[-1][index][0])
        page.heading(
            f"Position {position} ({readable(lens.prompt_tokens[index])}): top tokens by layer",
            f"The last layer is the model's own prediction, {final}; the last column is that token's probability at every layer.",
        )
        page.body.append(_lens_table(lens, index, final))
    page.heading("The top token of every layer", "One row per layer, one column per position; colour: its probability, white 0 to blue 1.")
    shown = [[as_text(tokens[0]) for tokens in layer] for layer in lens.top_tokens]
    widths = [max(len(html.unescape(token)) for token in column) for column in zip(*shown)]
    for layer, label in reversed(list(enumerate(lens.layer_labels))):
        page.figure(
            "ColoredTokens",
            label=label,
            tokens=[token + "\u00a0" * (width - len(html.unescape(token))) for token, width in zip(shown[layer], widths)],
            values=lens.top_probs[layer, :, 0].tolist(),
            minValue=0,
            maxValue=1,
            positiveColor=_SHADE,
        )
    if path is not None:
        page.write(path)
    return page


def _lens_table(lens: Any, index: int, final: str) -> str:
    """One row per layer, the last on top: the top tokens with their probabilities, then the final top token's probability."""
    rows = []
    for layer, label in reversed(list(enumerate(lens.layer_labels))):
        tops = zip(lens.top_tokens[layer][index], lens.top_probs[layer, index].tolist())
        cells = [_lens_cell(as_text(token), p) for token, p in tops]
        cells.append(_lens_cell("", float(lens.final_probs[layer, index])))
        rows.append(f"<tr><th>{html.escape(label)}</th>{''.join(cells)}</tr>")
    heads = [f"<th>{rank + 1}</th>" for rank in range(lens.top_ids.shape[-1])]
    head = f"<tr><th></th>{''.join(heads)}<th>{html.escape(final)}</th></tr>"
    return f'<div class="table"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _lens_cell(text: str, p: float) -> str:
    """A table cell coloured from white (0) to blue (1)."""
    red, green, blue = (1 + p * (part - 1) for part in to_rgb(_SHADE))
    shade = to_hex((red, green, blue))
    return f'<td style="background:{shade};color:#000">{text}<small>{p:.2g}</small></td>'
