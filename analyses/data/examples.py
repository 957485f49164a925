"""Questions about images, in one format for all analyses.

A data set is named by a string:

    scenes, scenes:train, scenes:validation     the embedded world
    FILE.jsonl                                  one question per line (or an array); image paths relative to the file
    DIR                                         a folder with questions.jsonl, or with one such folder per domain

A line: {"image": "a.png" (or "images": [...]), "question": "...", "answer": "...", and optionally "id", "domain",
"category", "candidates": ["red", "blue"]}; `schema.QUESTION` defines the type of each.

A limit takes questions from all domains and categories in turn, in an order drawn from a seed, because files are often sorted
by them. A warning (`LeftOut`) says how many were left out. A larger limit adds questions and changes none.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from random import Random
from typing import Any

from analyses.data.json_lines import rows_and_errors
from analyses.data.schema import QUESTION, not_whole, shown, tell_unknown
from hooked_qwen2vl.image_hash import image_hash
from hooked_qwen2vl.scenes import sample

LINES = "questions.jsonl"
_CHUNK = 50
_SHOWN = 12  # number of groups in a warning


class LeftOut(UserWarning):
    """A limit left out questions."""


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: unique in its data set.
        question, answer: the question and its right answer ("" if unknown).
        images: PIL images or paths.
        domain, category: "" if unknown.
        candidates: the possible answers to this kind of question; () if unknown.
        item: the item of the embedded world, with boxes and counterfactuals; None for other data.
    """

    id: str
    question: str
    answer: str
    images: tuple[Any, ...] = field(repr=False, default=())
    domain: str = ""
    category: str = ""
    candidates: tuple[str, ...] = ()
    item: Any = field(repr=False, default=None)


@dataclass(frozen=True)
class Unreadable(Example):
    """An invalid row: it keeps its index in the data, and a run records the reason.

    Attributes:
        problem: file, line and reason.
    """

    problem: str = ""


def problem_of(example: Example) -> str:
    """Why a question is invalid, without opening its images; "" if it is valid.

    Questions read from files were checked against `schema.QUESTION`; questions made in code are checked here.
    """
    if isinstance(example, Unreadable):
        return example.problem
    named = {name: getattr(example, name) for name in ("id", "question", "answer", "domain", "category")}
    if isinstance(example.candidates, (tuple, list)):
        named |= {f"candidates[{number}]": value for number, value in enumerate(example.candidates)}
    else:
        return f"expected candidates, a tuple of texts, got {shown(example.candidates)}"
    for name, value in named.items():
        if not isinstance(value, str):
            return f"expected {name}, a text, got {shown(value)}"
        if reason := not_whole(value):
            return f"{name} holds {reason}"
    if not isinstance(example.images, (tuple, list)):
        return f"expected images, a tuple of them, got {shown(example.images)}"
    return ""


def image_key(example: Example) -> str:
    """A key that is equal for questions about the same images: paths as given, or hashes of images in memory; without images the
    example's id."""
    names = (str(Path(image)) if isinstance(image, (str, Path)) else image_hash(image) for image in example.images)
    return " ".join(names) or example.id


def examples(
    data: str | Path | Iterable[Example] = "scenes",
    limit: int | None = None,
    split: str = "test",
    seed: int = 0,
    keep_bad: bool = False,
) -> Iterator[Example]:
    """Yields the questions of a data set; image files are not opened.

    Args:
        data: as above, or questions (with a limit, all of them are read, because the limit is spread over all). "scenes" is
            unlimited: without a limit, 1,000 questions are made.
        limit: number of questions, spread over domains and categories (see `spread`).
        split: of the embedded world, if `data` does not name one.
        seed: of the embedded world, or of the draw for the limit.
        keep_bad: yield an invalid line as an `Unreadable`, for a run to record, instead of raising.
    Raises:
        ValueError: no such data, no questions, or an invalid line (the message names file and line).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    if not isinstance(data, (str, Path)):
        yield from data if limit is None else spread(data, limit, seed)
        return
    data = str(data)
    if data.split(":")[0] == "scenes" and not Path(data).exists():
        yield from _scenes(data.partition(":")[2] or split, 1000 if limit is None else limit, seed)
        return
    stream = _files(Path(data), keep_bad)
    found = stream if limit is None else iter(spread(stream, limit, seed))
    first = next(found, None)
    if first is None:
        raise ValueError(f"{data} has no questions.")
    yield first
    yield from found


def spread(items: Iterable[Any], limit: int | None, seed: int = 0) -> list[Any]:
    """The first `limit` items of `in_turn`, with a warning about what was left out; all items in their own order if limit is None
    or at least their number."""
    items = list(items)
    if limit is None or limit >= len(items):
        return items
    kept = in_turn(items, seed)[:limit]
    warnings.warn(f"a limit leaves questions out: {_shares(items, kept)}.", LeftOut, stacklevel=2)
    return kept


def in_turn(items: Iterable[Any], seed: int = 0) -> list[Any]:
    """The items with domains taking turns, and within each domain its categories; each category is shuffled by the seed."""
    groups: dict[str, dict[str, list]] = {}
    for item in items:
        groups.setdefault(item.domain, {}).setdefault(item.category, []).append(item)
    for domain, kinds in groups.items():
        for kind, some in kinds.items():
            Random(f"{seed} {domain} {kind}").shuffle(some)
    return _turns(_turns(kinds.values()) for kinds in groups.values())


def _turns(groups: Iterable[Sequence[Any]]) -> list[Any]:
    return [item for turn in zip_longest(*groups) for item in turn if item is not None]


def _shares(items: Sequence[Any], kept: Sequence[Any]) -> str:
    """ "150 of 960 are kept: cats 50 of 320, charts 50 of 320, dogs 50 of 320"."""
    by = "domain" if len({item.domain for item in items}) > 1 else "category"
    there, here = (Counter(getattr(item, by) or "none" for item in some) for some in (items, kept))
    lines = [f"{name} {here[name]} of {n}" for name, n in there.items()]
    rest = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    groups = f" ({by}: {', '.join(lines[:_SHOWN])}{rest})" if len(lines) > 1 else ""
    return f"{len(kept)} of {len(items)} are kept{groups}"


def in_batches(stream: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """The elements of a stream in batches of `size`.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}.")
    stream = iter(stream)
    while batch := tuple(islice(stream, size)):
        yield batch


def _scenes(split: str, n: int, seed: int) -> Iterator[Example]:
    for start in range(0, n, _CHUNK):
        for index, item in enumerate(sample(min(_CHUNK, n - start), seed, split, start=start), start):
            yield Example(
                f"{split}-{seed}-{index}", item.question, item.answer, (item.image,), item.domain, item.category,
                item.candidates, item,
            )  # fmt: skip


def _files(path: Path, keep_bad: bool) -> Iterator[Example]:
    seen: set[str] = set()
    if path.is_file():
        yield from _lines(path, "", keep_bad, seen)
    elif (path / LINES).is_file():
        yield from _lines(path / LINES, "", keep_bad, seen)
    elif path.is_dir() and (domains := sorted(path.glob(f"*/{LINES}"))):
        for file in domains:
            yield from _lines(file, file.parent.name, keep_bad, seen)
    else:
        raise ValueError(f"expected 'scenes', a .jsonl file, or a folder with {LINES} (or one such folder a domain), got {path}.")


def _lines(file: Path, domain: str, keep_bad: bool, seen: set[str]) -> Iterator[Example]:
    unknown: dict[str, None] = {}
    for number, (line, row) in enumerate(rows_and_errors(file), 1):
        default = f"{domain or file.stem}-{number}"
        try:
            if isinstance(row, ValueError):
                raise row
            example = _example(row, file, default, domain, line)
            if example.id in seen:
                raise ValueError(f"{file}, line {line}: the id {shown(example.id)} comes twice.")
        except ValueError as error:
            if not keep_bad:
                raise
            name = f"{default} (line {line})"
            example = Unreadable(name, "", "", domain=domain, problem=str(error))
        else:
            unknown |= dict.fromkeys(QUESTION.unknown(row))
        seen.add(example.id)
        yield example
    tell_unknown(file, unknown)


def _example(row: dict[str, Any], file: Path, default: str, domain: str, line: int) -> Example:
    try:
        values = QUESTION.read(row)
    except ValueError as error:
        raise ValueError(f"{file}, line {line}: {error}.") from error
    images: Sequence[str] = values.get("images", (values["image"],) if "image" in values else ())
    return Example(
        id=values.get("id", default),
        question=values["question"],
        answer=values.get("answer", ""),
        images=tuple(file.parent / image for image in images),
        domain=values.get("domain", domain),
        category=values.get("category", ""),
        candidates=values.get("candidates", ()),
    )
