"""Pairs of prompts for patching: one question, two images of one grid, two different right answers.

1. Make candidates: from the embedded world, from a table of image pairs, or by swapping or blurring a box of an image.
2. Check each with the model: same grid and token count, answers that are single tokens and differ, the clean and the
   corrupted prompt both answered rightly, and logit differences far enough apart. What is refused keeps its reason.

Corruption is another image, never noise on the embeddings (Zhang & Nanda 2024; matched pairs as in NOTICE, 2024).
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_transforms import convert_to_rgb

from analyses.common.result import Result
from analyses.data.json_lines import read_text, rows_and_errors
from analyses.data.schema import PAIR, tell_unknown
from analyses.trajectory import word
from hooked_qwen2vl.geometry import Box, checked_box, refuse_unaligned
from hooked_qwen2vl.processor import open_image
from hooked_qwen2vl.prompt_text import text_ids
from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.scenes import counterfactual_pairs


@dataclass(frozen=True)
class Candidate(Result):
    """A pair that has not been checked.

    Attributes:
        question; clean, corrupted: images (PIL or paths).
        answer, other: right for the clean and for the corrupted image; `other` None means whatever the model
            answers there (after a blur nobody knows what is right).
        boxes: what was changed, original pixels; () where unknown.
        id, category, domain: for tables.
        problem: of a row that is no pair: file, line and reason; it is refused with that.
    """

    question: str
    clean: Any = field(repr=False)
    corrupted: Any = field(repr=False)
    answer: str
    other: str | None
    boxes: tuple[Box, ...] = ()
    id: str = ""
    category: str = ""
    domain: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Pair(Result):
    """A pair that a model answers rightly on both sides.

    Attributes:
        clean, corrupted: encoded `Inputs` of one row. source: what it was made from.
        answer_id, other_id: the single tokens followed.
        changed: positions whose pixels differ. on_boxes: positions that `source.boxes` touch.
        clean_difference, corrupted_difference: z(answer) − z(other) at the last position, in logits.
    """

    clean: Any = field(repr=False)
    corrupted: Any = field(repr=False)
    source: Candidate
    answer_id: int
    other_id: int
    changed: Int[Tensor, "n"]
    on_boxes: Int[Tensor, "n"]
    clean_difference: float
    corrupted_difference: float

    def metric(self, logits: Float[Tensor, "batch 1 d_vocab"]) -> Float[Tensor, "batch"]:
        """z(answer) − z(other): for `patch_sweep`."""
        return logits[:, -1, self.answer_id] - logits[:, -1, self.other_id]


@dataclass(frozen=True)
class Pairs(Result):
    """The pairs kept, and why the others were not."""

    kept: tuple[Pair, ...]
    refused: tuple[tuple[Candidate, str], ...]
    model_name: str

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self):
        return iter(self.kept)

    @property
    def reasons(self) -> dict[str, int]:
        """How many were refused for each reason."""
        return dict(Counter(reason for _, reason in self.refused).most_common())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per candidate: what was asked, the logit differences of a pair that was kept, or the reason."""
        kept = [
            {**_row(pair.source), "other": pair.source.other, "clean_difference": pair.clean_difference,
             "corrupted_difference": pair.corrupted_difference, "changed_tokens": len(pair.changed), "refused": ""}
            for pair in self.kept
        ]  # fmt: skip
        return pd.DataFrame(kept + [{**_row(candidate), "refused": reason} for candidate, reason in self.refused])

    def plot(self, path: Any = None) -> Any:
        """The logit differences of the pairs kept, clean against corrupted, and why the others were not."""
        from analyses.views.experiments import pairs_plot

        return pairs_plot(self, path)


@torch.no_grad()
def check_pairs(
    model: Model,
    candidates: Iterable[Candidate],
    min_gap: float = 1.0,
    n: int | None = None,
    progress: bool = True,
) -> Pairs:
    """Runs each candidate and keeps those that patching can say something about.

    Args:
        min_gap: least LD_clean − LD_corrupted, in logits.
        n: stop when so many are kept.
    Returns:
        the pairs kept; the others are in `refused`, with the reason: also an image that cannot be read, or a row that is no pair.
    """
    kept, refused = [], []
    with tqdm(total=n, desc="checking pairs", unit="pair", disable=not progress, delay=2) as bar:
        for candidate in candidates:
            if n is not None and len(kept) >= n:
                break
            try:
                pair = candidate.problem or _check(model, candidate, min_gap)
            except (ValueError, OSError) as error:
                pair = str(error)
            if isinstance(pair, str):
                refused.append((candidate, pair))
            else:
                kept.append(pair)
                bar.update()
    return Pairs(tuple(kept), tuple(refused), str(model.cfg.model_name))


def scene_candidates(n: int, seed: int = 0, **restrictions: Any) -> list[Candidate]:
    """n pairs of the embedded world: the same scene with one attribute of one object changed.

    Args:
        restrictions: as for `hooked_qwen2vl.scenes.sample` (split, domain, category, grid, level).
    """
    return [
        Candidate(
            item.question, item.image, partner.image, item.answer, partner.answer,
            cast(Any, tuple(thing.box for thing in partner.changed)), f"scenes-{seed}-{number}", item.category, item.domain,
        )
        for number, (item, partner) in enumerate(counterfactual_pairs(n, seed, **restrictions))
    ]  # fmt: skip


def read_candidates(path: str | Path, keep_bad: bool = False) -> list[Candidate]:
    """Pairs from a table: CSV, or JSON lines, with columns question, clean, corrupted (images, relative to the file),
    answer, other (may be left out), and optionally id, category, domain, and box as "x0,y0,x1,y1" or a list
    (`analyses.data.schema.PAIR`; an empty cell of a CSV is left out).

    Args:
        path: the file, or a folder that has pairs.csv or pairs.jsonl.
        keep_bad: give a row that is no pair as a candidate that only has a `problem`, instead of raising.
    Raises:
        ValueError: no such file, or a row that is not as described (it is named).
    """
    path = Path(path)
    file = next((f for f in (path, path / "pairs.csv", path / "pairs.jsonl") if f.is_file()), None)
    if file is None:
        raise ValueError(f"expected a .csv or .jsonl file of pairs, or a folder with pairs.csv or pairs.jsonl, got {path}.")
    found, unknown = [], {}
    for number, (where, row) in enumerate(_csv_rows(file) if file.suffix == ".csv" else _json_rows(file), 1):
        try:
            if isinstance(row, ValueError):
                raise row
            found.append(_candidate(row, file, where, number))
            unknown |= dict.fromkeys(PAIR.unknown(row))
        except ValueError as error:
            if not keep_bad:
                raise
            found.append(Candidate("", None, None, "", None, id=f"{file.stem}-{number} ({where})", problem=str(error)))
    tell_unknown(file, unknown)
    return found


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """("row 1", its cells that are not empty); a box is a list."""
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            where = f"row {number}"
            if None in row:
                yield where, ValueError(f"{file}, {where}: {len(row[None])} cells more than the header has columns.")
                continue
            cells = {name: cell for name, cell in row.items() if cell}
            if "box" in cells:
                cells["box"] = _numbers(cells["box"])
            yield where, cells
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: not CSV ({error}).") from error


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    for line, row in rows_and_errors(file):
        if isinstance(row, dict) and isinstance(row.get("box"), str):
            row = row | {"box": _numbers(row["box"])}
        yield f"line {line}", row


def _numbers(text: str) -> list[float] | str:
    """ "x0,y0,x1,y1" as a list; as it is where it is something else."""
    try:
        return [float(edge) for edge in text.split(",")]
    except ValueError:
        return text


def swap_box(image: Any, box: Box, other: Any) -> Image.Image:
    """The image with a box of another image of its size (both in original pixels).

    Raises:
        ValueError: images of different size, or a box that is not inside.
    """
    image, other = _rgb(image), _rgb(other)
    if image.size != other.size:
        raise ValueError(f"expected images of one size, got {image.size} and {other.size}: the grids would differ.")
    edges = _edges(box, image)
    swapped = image.copy()
    swapped.paste(other.crop(edges), edges[:2])
    return swapped


def blur_box(image: Any, box: Box, radius: float | None = None) -> Image.Image:
    """The image with a box blurred past recognition.

    Args:
        radius: of the Gaussian, in pixels; None takes half of the box's longer side.
    Raises:
        ValueError: a box that is not inside.
    """
    image = _rgb(image)
    edges = _edges(box, image)
    radius = max(edges[2] - edges[0], edges[3] - edges[1]) / 2 if radius is None else radius
    blurred = image.copy()
    blurred.paste(image.filter(ImageFilter.GaussianBlur(radius)).crop(edges), edges[:2])
    return blurred


def changed_positions(clean: Any, corrupted: Any, row: int = 0) -> Int[Tensor, "n"]:
    """Positions of the image tokens any of whose patches differ between two prompts of one grid.

    Raises:
        ValueError: the prompts do not correspond position by position, hold no image, or have no such row.
    """
    refuse_unaligned(clean, corrupted, "the clean and the corrupted prompts")
    if clean.pixels is None or corrupted.pixels is None:
        raise ValueError("expected two prompts with images, got one without: there is no image token to compare.")
    if not -len(clean) <= row < len(clean):
        raise ValueError(f"there is no row {row}: the batch has {len(clean)}.")
    differs = (clean.pixels != corrupted.pixels).any(-1)
    is_image = clean.token_types > 0
    window = len(differs) // int(is_image.sum())
    marks = torch.zeros_like(is_image)
    marks[is_image] = differs.view(-1, window).any(-1).to(marks.device)
    return marks[row].nonzero().flatten().cpu()


def _check(model: Model, candidate: Candidate, min_gap: float) -> Pair | str:
    """The pair, or why it is refused."""
    prompts = [model.to_inputs(candidate.question, images=[image]) for image in (candidate.clean, candidate.corrupted)]
    if prompts[0].shape != prompts[1].shape or not torch.equal(prompts[0].position_ids, prompts[1].position_ids):
        return "the images give different grids"
    clean, corrupted = (model.encode(prompt) for prompt in prompts)
    last = clean.shape[1] - 1
    before, after = (model(prompt, logits_at=last)[0, 0].float() for prompt in (clean, corrupted))
    other = candidate.other if candidate.other is not None else model.tokenizer.decode([int(after.argmax())])
    if word(other) == word(candidate.answer):
        return "both have one answer"
    answer_id, other_id = _token(model, candidate.answer, before), _token(model, other, after)
    if answer_id is None or other_id is None:
        return "an answer is not a single token"
    if int(before.argmax()) != answer_id:
        return "clean answered wrongly"
    if int(after.argmax()) != other_id:
        return "corrupted answered wrongly"
    differences = [float(logits[answer_id] - logits[other_id]) for logits in (before, after)]
    if differences[0] - differences[1] < min_gap:
        return f"logit differences closer than {min_gap:g}"
    touched = [clean.positions(box) for box in candidate.boxes]
    return Pair(
        clean, corrupted, candidate, answer_id, other_id, changed_positions(clean, corrupted),
        torch.cat(touched).unique() if touched else changed_positions(clean, corrupted), *differences,
    )  # fmt: skip


def _token(model: Model, answer: str, logits: Float[Tensor, "d_vocab"]) -> int | None:
    """The single token, among the answer's forms (case, leading space), that the model likes best; None where none is."""
    bare = answer.strip()
    forms = {prefix + form for form in (bare, bare.lower(), bare[:1].upper() + bare[1:]) for prefix in ("", " ")}
    ids = [text_ids(model.tokenizer, form) for form in sorted(forms)]
    single = [token[0] for token in ids if len(token) == 1]
    return max(single, key=lambda token: float(logits[token]), default=None)


def _row(candidate: Candidate) -> dict[str, str]:
    return {name: getattr(candidate, name) for name in ("id", "question", "answer", "category", "domain")}


def _candidate(row: dict[str, Any], file: Path, where: str, number: int) -> Candidate:
    missing = [name for name in PAIR.needed if name not in row]
    if missing:
        raise ValueError(f"{file}, {where}: no {', '.join(missing)}; each pair needs question, clean, corrupted, answer.")
    try:
        values = PAIR.read(row)
    except ValueError as error:
        hint = "; a box is x0,y0,x1,y1 in original pixels" if '"box"' in str(error) else ""
        raise ValueError(f"{file}, {where}: {error}{hint}.") from error
    return Candidate(
        values["question"], file.parent / values["clean"], file.parent / values["corrupted"], values["answer"],
        values.get("other"), (values["box"],) if "box" in values else (), values.get("id", f"{file.stem}-{number}"),
        values.get("category", ""), values.get("domain", ""),
    )  # fmt: skip


def _rgb(image: Any) -> Image.Image:
    """As the processor sees it: transparency on white."""
    return Image.fromarray(np.asarray(convert_to_rgb(open_image(image), return_numpy=True)))


def _edges(box: Sequence[float], image: Image.Image) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (round(edge) for edge in checked_box(box, image.size))
    width, height = image.size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"the box {tuple(box)} is not inside the image of {width}×{height} pixels.")
    return x0, y0, x1, y1
