"""Questions about images, one format for every analysis.

A data set is named by a string:

    scenes, scenes:train, scenes:validation     the embedded world
    FILE.jsonl                                  one question a line; image paths relative to the file
    DIR                                         a folder with questions.jsonl, or one such folder a domain

A line: {"image": "a.png" (or "images": [...]), "question": "...", "answer": "...", and optionally "id", "domain",
"category", "candidates": ["red", "blue"]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hooked_qwen2vl.image_hash import image_hash
from hooked_qwen2vl.scenes import sample

LINES = "questions.jsonl"
_CHUNK = 50


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: unique in its data set.
        question, answer: as asked, and what is right ("" where unknown).
        images: PIL images or paths.
        domain, category: "" where unknown.
        candidates: the answers of this kind, where known.
        item: the embedded world's own item, which knows boxes and counterfactuals; None for other data.
    """

    id: str
    question: str
    answer: str
    images: tuple[Any, ...] = field(repr=False, default=())
    domain: str = ""
    category: str = ""
    candidates: tuple[str, ...] = ()
    item: Any = field(repr=False, default=None)


def image_key(example: Example) -> str:
    """The same for all questions about the same images: their files' names as given, or a hash of pictures in memory;
    without any, the example's id."""
    names = (str(Path(image)) if isinstance(image, (str, Path)) else image_hash(image) for image in example.images)
    return " ".join(names) or example.id


def examples(data: str | Path = "scenes", limit: int | None = None, split: str = "test", seed: int = 0) -> Iterator[Example]:
    """The questions of a data set, one by one; images of folders stay on disk until they are opened.

    Args:
        data: as above. "scenes" has no end of its own: without a limit, 1,000 are made.
        split: of the embedded world, where `data` does not name it.
    Raises:
        ValueError: no such data, a line that is not as described (its file and number are named), or nothing there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    data = str(data)
    if data.split(":")[0] == "scenes" and not Path(data).exists():
        yield from _scenes(data.partition(":")[2] or split, 1000 if limit is None else limit, seed)
        return
    found = islice(_files(Path(data)), limit)
    first = next(found, None)
    if first is None:
        raise ValueError(f"{data} has no questions.")
    yield first
    yield from found


def _scenes(split: str, n: int, seed: int) -> Iterator[Example]:
    for start in range(0, n, _CHUNK):
        for index, item in enumerate(sample(min(_CHUNK, n - start), seed, split, start=start), start):
            yield Example(
                f"{split}-{seed}-{index}", item.question, item.answer, (item.image,), item.domain, item.category,
                item.candidates, item,
            )  # fmt: skip


def _files(path: Path) -> Iterator[Example]:
    if path.is_file():
        yield from _lines(path, "")
    elif (path / LINES).is_file():
        yield from _lines(path / LINES, "")
    elif path.is_dir() and (domains := sorted(path.glob(f"*/{LINES}"))):
        for file in domains:
            yield from _lines(file, file.parent.name)
    else:
        raise ValueError(f"expected 'scenes', a .jsonl file, or a folder with {LINES} (or one such folder a domain), got {path}.")


def _lines(file: Path, domain: str) -> Iterator[Example]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _example(line, file, number, domain)


def _example(line: str, file: Path, number: int, domain: str) -> Example:
    where = f"{file}, line {number}"
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}).") from error
    if not isinstance(values, dict) or not isinstance(values.get("question"), str):
        raise ValueError(f'{where}: expected an object with "image", "question" and "answer".')
    images: Sequence[str] = values.get("images") or ([values["image"]] if values.get("image") else [])
    return Example(
        id=str(values.get("id", f"{domain or file.stem}-{number}")),
        question=values["question"],
        answer=str(values.get("answer", "")),
        images=tuple(file.parent / image for image in images),
        domain=str(values.get("domain", domain)),
        category=str(values.get("category", "")),
        candidates=tuple(values.get("candidates", ())),
    )
