"""Pairs of prompts for patching: one question, two images with the same grid, two different right answers.

1. Make candidates: from the embedded world, from a table of image pairs, or by swapping or blurring a box of an image.
2. Check each with the model: the grids and token counts are equal, the answers are different single tokens, the model answers
   both prompts right, and the logit differences are far enough apart. Refused candidates are kept with the reason.

The corrupted prompt has another image, never noise on the embeddings (Zhang & Nanda 2024; matched pairs as in NOTICE, 2024).
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
        answer, other: right answers for the clean and the corrupted image. `other` None: the model's own answer, for images
            without a known right answer, such as blurred ones.
        boxes: what was changed, original pixels; () if unknown.
        id, category, domain: for tables.
        problem: for a row of a file that is not a valid pair: file, line and reason. Such a candidate is refused.
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
    """A pair of prompts that the model both answers right.

    Attributes:
        clean, corrupted: encoded `Inputs` of one row. source: the candidate.
        answer_id, other_id: tokens of the two answers.
        changed: image token positions whose pixels differ. on_boxes: those that `source.boxes` touch; without boxes: `changed`.
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
        """The logit difference z(answer) − z(other), as a metric for `patch_sweep`."""
        return logits[:, -1, self.answer_id] - logits[:, -1, self.other_id]


@dataclass(frozen=True)
class Pairs(Result):
    """The pairs that were kept, and the refused candidates with their reasons."""

    kept: tuple[Pair, ...]
    refused: tuple[tuple[Candidate, str], ...]
    model_name: str

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self):
        return iter(self.kept)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of refused candidates for each reason."""
        return dict(Counter(reason for _, reason in self.refused).most_common())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per candidate: question and answers, then the logit differences, or the reason for refusing it."""
        kept = [
            {**_row(pair.source), "other": pair.source.other, "clean_difference": pair.clean_difference,
             "corrupted_difference": pair.corrupted_difference, "changed_tokens": len(pair.changed), "refused": ""}
            for pair in self.kept
        ]  # fmt: skip
        return pd.DataFrame(kept + [{**_row(candidate), "refused": reason} for candidate, reason in self.refused])

    def plot(self, path: Any = None) -> Any:
        """Logit differences of the kept pairs, clean against corrupted, and the reasons for refusing the others."""
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
    """Runs the model on each candidate and keeps those that are suitable for patching.

    Args:
        min_gap: smallest allowed LD_clean − LD_corrupted, in logits (LD: logit difference).
        n: stop when this many are kept.
    Returns:
        the kept pairs; the other candidates are in `refused` with their reasons, including unreadable images and invalid rows.
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
    """n pairs of scenes of the embedded world; the corrupted scene differs from the clean one in one attribute of one object.

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
    """Reads candidates from a CSV or JSON lines file.

    Columns: question, clean, corrupted (image files, relative to the table), answer, and optionally other, id, category, domain,
    and box as "x0,y0,x1,y1" or a list (see `analyses.data.schema.PAIR`). Empty cells of a CSV count as missing.

    Args:
        path: the file, or a folder with pairs.csv or pairs.jsonl.
        keep_bad: return an invalid row as a candidate that has only a `problem`, instead of raising.
    Raises:
        ValueError: no such file, or (unless keep_bad) an invalid row, which the message names.
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
    """("row 1", its non-empty cells), with box as a list; or ("row 1", the error)."""
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
    """ "x0,y0,x1,y1" as a list of numbers; other texts unchanged."""
    try:
        return [float(edge) for edge in text.split(",")]
    except ValueError:
        return text


def swap_box(image: Any, box: Box, other: Any) -> Image.Image:
    """A copy of the image in which a box is replaced by the same box of another image; the box is in original pixels.

    Raises:
        ValueError: images of different sizes, or a box that is not inside.
    """
    image, other = _rgb(image), _rgb(other)
    if image.size != other.size:
        raise ValueError(f"expected images of one size, got {image.size} and {other.size}: the grids would differ.")
    edges = _edges(box, image)
    swapped = image.copy()
    swapped.paste(other.crop(edges), edges[:2])
    return swapped


def blur_box(image: Any, box: Box, radius: float | None = None) -> Image.Image:
    """A copy of the image with a blurred box; the box is in original pixels.

    Args:
        radius: of the Gaussian blur, in pixels; None: half of the box's longer side.
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
    """Positions of the image tokens with at least one patch that differs between the two prompts.

    Raises:
        ValueError: the prompts' positions do not correspond, a prompt has no image, or there is no such row.
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
    """The answer's token with the largest logit, among its forms (case, leading space) that are single tokens; None without any."""
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
    """The image as the processor reads it: RGB, with transparency on white."""
    return Image.fromarray(np.asarray(convert_to_rgb(open_image(image), return_numpy=True)))


def _edges(box: Sequence[float], image: Image.Image) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (round(edge) for edge in checked_box(box, image.size))
    width, height = image.size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"the box {tuple(box)} is not inside the image of {width}×{height} pixels.")
    return x0, y0, x1, y1
