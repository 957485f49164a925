"""The explorer page: one HTML file that contains its data and needs no network and no framework.

The data are gzipped and in base64: length of the header (uint32, little-endian), the header (JSON, UTF-8, padded with spaces to
a multiple of 4 bytes), then the arrays that it lists, each padded to a multiple of 4 bytes. Texts are in one table that the
arrays index; the page shows them as text, never as markup. Encoding of numbers:

    probabilities   16 bits, logarithmic from 1e-12 to 1; relative error at most 0.03 %
    attention        8 bits, square root, from 0 to the map's largest value; error at most 0.4 % of that value
    cosine, entropy 16 bits, linear from the array's smallest to its largest value
    recovery        32-bit floats
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import re
import struct
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from hooked_qwen2vl.files import whole_file

FLOOR = -12.0  # log10 of the smallest probability; smaller ones are stored as this
_MOST_ATTENTION = 500_000  # compressed bytes of attention on the page, at most
_SIDE = 896  # pixels of an image's longer side, at most


class Embedded:
    """A whole page; a notebook shows it in a frame."""

    def __init__(self, text: str):
        self.text = text

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.text)}" style="width:100%;height:900px;border:0"></iframe>'


def explorer_page(result: Any, path: str | Path | None = None) -> Embedded:
    """The page of an `Explorer`, also written to a file if a path is given."""
    title = f"{result.question or 'Explorer'}, {result.model_name}"
    parts = {"title": html.escape(title), "style": _file("css"), "script": _file("js"), "data": _payload(result)}
    # In one pass, so that braces in inserted texts are not replaced.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("html"))
    if path is not None:
        with whole_file(path) as file:
            file.write_text(page, encoding="utf-8", errors="backslashreplace")
    return Embedded(page)


def _file(kind: str) -> str:
    return files("analyses.views").joinpath(f"explorer.{kind}").read_text(encoding="utf-8")


def _payload(result: Any) -> str:
    """The data of the page: base64 of the gzipped header and arrays."""
    lens = result.lens
    ids, texts = _table(result)
    pack = _Pack()
    pack.indices("top", np.searchsorted(ids, lens.top_ids.numpy()), len(ids))
    pack.probabilities("topProbs", lens.top_probs.numpy())
    pack.linear("entropy", lens.entropy.numpy())
    pack.indices("kept", np.searchsorted(ids, result.kept_ids.numpy()), len(ids))
    pack.probabilities("keptProbs", result.kept_probs.numpy())
    pack.probabilities("restProb", result.rest_prob.numpy())
    if lens.target_ids is not None:
        pack.indices("followed", np.searchsorted(ids, lens.target_ids.numpy()), len(ids))
        pack.probabilities("followedProbs", lens.target_probs.numpy())
    heads = result.attention_from.numpy()
    n_queries = pack.by_map("attention", np.concatenate((heads.mean(2, keepdims=True), heads), axis=2), _MOST_ATTENTION)
    if result.contextual is not None:
        pack.linear("contextual", result.contextual.numpy())
    if result.recovery is not None:
        pack.floats("recovery", result.recovery.numpy())
    header = {
        "question": result.question,
        "answer": result.answer_text,
        "model": result.model_name,
        "layers": list(lens.layer_labels),
        "blocks": len(heads),
        "heads": heads.shape[2],
        "queries": list(result.queries[:n_queries]),
        "whole": not result.rest_prob.any(),
        "k": lens.top_ids.shape[-1],
        "positions": list(lens.positions),
        "prompt": list(lens.prompt_tokens),
        "segments": list(result.segments),
        "last": result.last,
        "answerPlaces": list(result.answer),
        "ids": np.diff(ids, prepend=0).tolist(),  # differences of increasing ids are short
        "texts": texts,
        "floor": FLOOR,
        "images": [
            {"name": name, "start": start, "rows": grid[0], "cols": grid[1], "width": image.width, "height": image.height}
            | pack.picture(f"image{number}", image)
            for number, (image, start, grid, name) in enumerate(zip(result.images, result.starts, result.grids, result.image_names))
        ],
        "others": [pack.picture(f"other{number}", image) for number, image in enumerate(result.other_images)],
        "otherAnswer": result.other_answer,
    }
    return pack.base64(header)


def _table(result: Any) -> tuple[np.ndarray, list[str]]:
    """(all token ids on the page, increasing, their texts)."""
    lens = result.lens
    text = dict(zip(result.kept_ids.tolist(), result.kept_tokens))
    if lens.target_ids is not None:
        text |= zip(lens.target_ids.tolist(), lens.target_tokens)
    for layer, tokens in zip(lens.top_ids.tolist(), lens.top_tokens):
        for at_position, words in zip(layer, tokens):
            text |= zip(at_position, words)
    ids = sorted(text)
    return np.array(ids), [text[i] for i in ids]


class _Pack:
    """Arrays one after another in `body`, with offsets and types in `arrays`."""

    def __init__(self) -> None:
        self.arrays: dict[str, dict[str, Any]] = {}
        self.body = bytearray()

    def _add(self, name: str, data: bytes, **about: Any) -> dict[str, Any]:
        self.arrays[name] = {"offset": len(self.body), "bytes": len(data)} | about
        self.body += data + b"\0" * (-len(data) % 4)
        return self.arrays[name]

    def _numbers(self, name: str, values: np.ndarray, kind: str, **about: Any) -> None:
        self._add(name, np.ascontiguousarray(values).tobytes(), kind=kind, shape=list(values.shape), **about)

    def indices(self, name: str, values: np.ndarray, n: int) -> None:
        kind, dtype = ("uint16", "<u2") if n <= 1 << 16 else ("uint32", "<u4")
        self._numbers(name, values.astype(dtype), kind)

    def probabilities(self, name: str, values: np.ndarray) -> None:
        logs = np.log10(np.clip(values.astype(np.float64), 10.0**FLOOR, 1.0))
        self._numbers(name, np.rint((1 - logs / FLOOR) * 65535).astype("<u2"), "uint16")

    def linear(self, name: str, values: np.ndarray) -> None:
        low, high = float(values.min()), float(values.max())
        scaled = (values.astype(np.float64) - low) / ((high - low) or 1.0)
        self._numbers(name, np.rint(scaled * 65535).astype("<u2"), "uint16", low=low, high=high)

    def by_map(self, name: str, values: np.ndarray, most: int) -> int:
        """Adds [layer query map pos], each map scaled from 0 to its largest value, and returns the number of queries.

        Takes as many queries as fit into `most` compressed bytes, but at least one.
        """
        largest = values.max(-1).astype(np.float64)
        scaled = np.rint(255 * np.sqrt(values / np.where(largest, largest, 1.0)[..., None])).astype("<u1")
        sizes = np.cumsum([len(zlib.compress(scaled[:, query].tobytes())) for query in range(scaled.shape[1])])
        n = max(1, int((sizes <= most).sum()))
        self._numbers(name, scaled[:, :n], "uint8", largest=largest[:, :n].tolist())
        return n

    def floats(self, name: str, values: np.ndarray) -> None:
        self._numbers(name, values.astype("<f4"), "float32")

    def picture(self, name: str, image: Any) -> dict[str, Any]:
        """Adds an image, at most _SIDE pixels large: PNG if it is small (up to 256 × 256 pixels in all), else JPEG."""
        drawn = image.convert("RGB")
        drawn.thumbnail((_SIDE, _SIDE))
        kind = "png" if drawn.width * drawn.height <= 256 * 256 else "jpeg"
        written = io.BytesIO()
        drawn.save(written, kind, **({"quality": 80} if kind == "jpeg" else {"optimize": True}))
        self._add(name, written.getvalue(), kind="bytes")
        return {"array": name, "type": f"image/{kind}"}

    def base64(self, header: dict[str, Any]) -> str:
        text = json.dumps(header | {"arrays": self.arrays}, ensure_ascii=False, separators=(",", ":"))
        head = text.encode("utf-8", "surrogatepass")
        head += b" " * (-len(head) % 4)
        packed = gzip.compress(struct.pack("<I", len(head)) + head + bytes(self.body), 9, mtime=0)
        return base64.b64encode(packed).decode("ascii")
