"""Hallucination benchmarks, read from local copies in the formats their authors publish.

    load_pope(FILE)      object existence, yes or no; positive class yes               (Li et al., EMNLP 2023)
    load_amber(DIR)      yes/no on existence, attributes, relations (positive class no), and free (Wang et al. 2023)
    load_hqh(DIR)        eight types of free answers                                   (Yan et al. 2024)
    load_mmhal(FILE)     96 questions, type = index mod 8                              (Sun et al. 2023)
    load_chair(FILE)     captions, and the objects in their images                     (Rohrbach et al., EMNLP 2018)
    load_grounding(FILE) phrases with a box or a mask, such as RefCOCO
    load_scenes()        the embedded world

1. A file is a JSON array or JSON lines; the first character that is not a space decides which (POPE's COCO files are JSON
   lines although they are named .json).
2. Every row is checked against its schema in `analyses.data.schema`. Bad rows are counted and named by file and line; none is
   left out silently.
3. An answer is judged only if the benchmark defines how: yes or no, the exact answer, or a list of objects. Otherwise the
   question's judge is `NEEDS_A_JUDGE`, and answers are neither right nor wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from analyses.common.result import Result
from analyses.data import schema as columns
from analyses.data.examples import Example, examples, spread
from analyses.data.json_lines import read_json, read_rows, read_text, rows_and_errors
from analyses.data.schema import AMBER_TYPES, Schema, shown, tell_unknown
from analyses.data.schema import HQH_TYPES as HQH_TYPES

YES_NO, EXACT, OBJECTS, NEEDS_A_JUDGE = "yes/no", "exact", "objects", "needs a judge"
MMHAL_TYPES = (
    "attribute", "adversarial object", "comparison", "counting", "spatial relation", "environment", "holistic", "other",
)  # fmt: skip
CAPTION_PROMPT = "Please describe this image in detail."
_SHOWN = 5
_EXISTENCE = re.compile(
    r"^\s*(?:is|are) there (?:an? |any |some )?(?P<noun>.+?)(?:,? (?:in|on) (?:the|this) (?:image|picture|photo))?\s*\?\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question(Example):
    """One question of a benchmark.

    Attributes:
        benchmark: "pope", "amber", …; source: "file, line N" from which it was read.
        judge: YES_NO, EXACT, OBJECTS or NEEDS_A_JUDGE.
        noun: the object of a question about existence ("dog" in "Is there a dog in the image?"); "" otherwise.
        given: an answer or caption in the file; "" if there is none.
        truth: objects in the image; hallucinated: objects that models often make up (AMBER's list); empty if unknown.
        boxes: (x0, y0, x1, y1) in original pixels of what the answer names; mask: file of its mask. Both for grounding data.
    """

    benchmark: str = ""
    source: str = ""
    judge: str = NEEDS_A_JUDGE
    noun: str = ""
    given: str = ""
    truth: tuple[str, ...] = ()
    hallucinated: tuple[str, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    mask: Path | None = None


class Benchmark(list[Question]):
    """The questions of a benchmark; `problems` has one text per bad row that was left out, with the reason."""

    def __init__(self, items: Sequence[Question] = (), problems: Sequence[str] = ()):
        super().__init__(items)
        self.problems = tuple(problems)

    def spread(self, limit: int | None, seed: int = 0) -> Benchmark:
        """`limit` questions, taken from the categories in turn (see `examples.spread`), because files are often sorted by category."""
        return Benchmark(spread(self, limit, seed), self.problems)


# ---- loaders ----------------------------------------------------------------------------------------


def load_pope(file: str | Path, images: str | Path | None = None, skip_bad: bool = False, check_images: bool = True) -> Benchmark:
    """POPE: rows {question_id, image, text, label}, label yes or no.

    Args:
        images: the folder of the images; by default the folder of the file.
        skip_bad: leave out bad rows and list them in `problems`, instead of raising.
        check_images: whether every image file must exist; pass False to judge answers only.
    Raises:
        ValueError: no such file, or bad rows (the message counts them and shows the first five, with their lines).
    """
    file, folders = Path(file), _folders(images, Path(file).parent)
    category = next((kind for kind in ("random", "popular", "adversarial") if kind in file.stem), file.stem)

    def question(row: dict, index: int) -> dict:
        return {
            "id": row["question_id"],
            "question": row["text"],
            "answer": row["label"],
            "images": (_image(folders, [row["image"]], check_images),),
            "category": category,
            "judge": YES_NO,
        }

    return _load("pope", columns.POPE, file, question, skip_bad)


def load_hqh(folder: str | Path, images: str | Path | None = None, skip_bad: bool = False, check_images: bool = True) -> Benchmark:
    """HQH: DIR/HQH.json, rows {id, image_id, image, instruction, ground_truth, type}; free answers, for a judge.

    Other arguments and errors: as `load_pope`. Images are at the row's path, or under its file name, relative to the folder.
    """
    folder = Path(folder)
    file = folder / "HQH.json" if folder.is_dir() else folder
    folders = _folders(images, file.parent)

    def question(row: dict, index: int) -> dict:
        name = row["image"]
        return {
            "id": row["id"],
            "question": row["instruction"],
            "answer": row["ground_truth"],
            "images": (_image(folders, [name, PurePosixPath(name).name], check_images),),
            "category": row["type"],
        }

    return _load("hqh", columns.HQH, file, question, skip_bad)


def load_amber(folder: str | Path, images: str | Path | None = None, skip_bad: bool = False, check_images: bool = True) -> Benchmark:
    """AMBER: queries {id, image, query}, and annotations.json, an array whose index id − 1 belongs to a query.

    Args:
        folder: AMBER's folder (with query_all.json, or query_*.json, in it, in query/ or in data/query/), or one query file.
            annotations.json is there or in data/; images are there, in image/ or in images/.
    Other arguments and errors: as `load_pope`; no annotations is an error, too.
    """
    given = Path(folder)
    base = given if given.is_dir() else given.parent
    queries = _amber_queries(base) if given.is_dir() else [given]
    places = [base / "annotations.json", base / "data" / "annotations.json", base.parent / "annotations.json"]
    notes = [row for _, row in read_rows(next((p for p in places if p.is_file()), places[0]))]
    roots = [base, base.parent] if base.name in ("query", "data") else [base]
    folders = _folders(images, *(root / name for root in roots for name in ("image", "images", ".")))

    def question(row: dict, index: int) -> dict:
        number = row["id"]
        if not 1 <= number <= len(notes):
            raise ValueError(f"id {shown(number)} has no annotation: there are {len(notes)}")
        note = notes[number - 1]
        kind = _of_annotation(columns.AMBER_KIND, note, number)
        if kind.get("id", number) != number:
            raise ValueError(f"annotation {number} is {ascii(note)[:60]}: expected an object with that id")
        common = {
            "id": str(number),
            "question": row["query"],
            "images": (_image(folders, [row["image"]], check_images),),
            "category": AMBER_TYPES[kind["type"]],
        }
        if kind["type"] == "generative":
            lists = _of_annotation(columns.AMBER_GENERATIVE, note, number)
            return common | {"truth": lists.get("truth", ()), "hallucinated": lists.get("hallu", ())}
        return common | {"answer": _of_annotation(columns.AMBER_YES_NO, note, number)["truth"], "judge": YES_NO}

    return _load("amber", columns.AMBER_QUERY, queries, question, skip_bad)


def load_mmhal(file: str | Path, images: str | Path | None = None, skip_bad: bool = False, check_images: bool = True) -> Benchmark:
    """MMHal-Bench: an array {question, gt_answer, model_answer, image_content[]}; type = index mod 8; for a judge.

    The image is the file name of the row's `image` or `image_src`, or `image_id`.jpg, in the folder `images` (by default the
    folder images/ next to the file, or the file's folder). Other arguments and errors: as `load_pope`.
    """
    file = Path(file)
    file = file / "response_template.json" if file.is_dir() else file
    folders = _folders(images, file.parent / "images", file.parent)

    def question(row: dict, index: int) -> dict:
        names = [PurePosixPath(row[key]).name for key in ("image", "image_src") if key in row]
        names += [f"{row['image_id']}.jpg"] if "image_id" in row else []
        return {
            "id": str(index),
            "question": row["question"],
            "answer": row["gt_answer"],
            "images": (_image(folders, names, check_images),),
            "category": MMHAL_TYPES[index % 8],
            "given": row.get("model_answer", ""),
            "truth": row.get("image_content", ()),
        }

    return _load("mmhal", columns.MMHAL, file, question, skip_bad)


def load_chair(
    file: str | Path,
    images: str | Path | None = None,
    objects: str | Path | Mapping[str, Sequence[str]] | None = None,
    skip_bad: bool = False,
    check_images: bool = True,
) -> Benchmark:
    """Captions {image_id, caption}, as an array or JSON lines, for `chair`.

    Args:
        images: their folder (files named image_id, image_id.jpg or .png, or as in COCO). Without it captions can be judged, but not
            scored by a model.
        objects: image_id -> objects in the image, or a JSON file with that; a row may have its own list "objects" instead.
    Other arguments and errors: as `load_pope`. If `objects` is given, a row about an image without a list is a bad row.
    """
    file = Path(file)
    known = _object_lists(objects)

    def question(row: dict, index: int) -> dict:
        name = row["image_id"]
        listed = row["objects"] if "objects" in row else known.get(name) if known is not None else None
        if listed is None and known is not None:
            raise ValueError(f"no objects are listed for image {name}")
        return {
            "id": name,
            "question": CAPTION_PROMPT,
            "images": () if images is None else (_image(_folders(images), _coco_names(name), check_images),),
            "category": "caption",
            "judge": NEEDS_A_JUDGE if listed is None else OBJECTS,
            "given": row["caption"],
            "truth": () if listed is None else tuple(listed),
        }

    return _load("chair", columns.CAPTION, file, question, skip_bad)


def load_grounding(file: str | Path, images: str | Path | None = None, skip_bad: bool = False, check_images: bool = True) -> Benchmark:
    """Phrases and their places in an image: {image, phrase, box | bbox, mask}, as an array or JSON lines.

    box is (x0, y0, x1, y1), bbox is COCO's (x, y, width, height), both in original pixels; mask is an image file of the
    same size that is not zero where the phrase is. "phrase" may also be called "expression" or "sentence". Other arguments
    and errors: as `load_pope`.
    """
    file = Path(file)
    folders = _folders(images, file.parent)

    def question(row: dict, index: int) -> dict:
        phrase = next((row[key] for key in ("phrase", "expression", "sentence") if key in row), None)
        if phrase is None:
            raise ValueError('expected "phrase", a text, got nothing')
        if not {"box", "bbox", "mask"} & set(row):
            raise ValueError('expected "box", "bbox" or "mask", got nothing')
        return {
            "id": row.get("id", str(index)),
            "question": f"Where is {phrase}?",
            "answer": phrase,
            "images": (_image(folders, [row["image"]], check_images),),
            "category": row.get("category", ""),
            "boxes": _boxes(row),
            "mask": _image(folders, [row["mask"]], check_images) if "mask" in row else None,
        }

    return _load("grounding", columns.GROUNDING, file, question, skip_bad)


def load_scenes(limit: int = 1000, split: str = "test", seed: int = 0, start: int = 0) -> Benchmark:
    """The questions `start` … `limit` − 1 of the embedded world; an answer is right if it equals the world's answer."""
    inherited = [field.name for field in fields(Example)]
    found = list(examples("scenes", limit, split, seed))[start:]
    questions = [
        Question(
            **{name: getattr(item, name) for name in inherited},
            benchmark="scenes",
            source=f"scenes, item {index}",
            judge=EXACT,
            noun=object_noun(item.question),
        )
        for index, item in enumerate(found, start)
    ]
    return Benchmark(questions)


LOADERS: dict[str, Callable[..., Benchmark]] = {
    "pope": load_pope, "hqh": load_hqh, "amber": load_amber, "chair": load_chair, "mmhal": load_mmhal,
}  # fmt: skip


# ---- judging ----------------------------------------------------------------------------------------


def parse_yes_no(text: str) -> str:
    """ "no" or "yes", as POPE's script reads an answer: "no" if its first sentence has the word No, not or no.

    Everything else is "yes", even an answer that says neither (see `says_yes_or_no`).
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def says_yes_or_no(text: str) -> bool:
    """Whether the answer's first sentence says yes or no at all."""
    return parse_yes_no(text) == "no" or "yes" in re.findall(r"\w+", text.split(".")[0].lower())


def judge(item: Question, answer: str) -> bool | None:
    """Whether an answer is right; None if the benchmark leaves this to a judge.

    EXACT ignores case, spaces and a final full stop.
    """
    if item.judge == YES_NO:
        return parse_yes_no(answer) == item.answer
    if item.judge == EXACT:
        return _plain(answer) == _plain(item.answer)
    return None


def object_noun(question: str) -> str:
    """The object of a question "Is there …?", without its article: "dog", "green bar"; "" for other questions."""
    found = _EXISTENCE.match(question)
    noun = found["noun"] if found else ""
    return "" if " between " in f" {noun} " else noun


def yes_no_metrics(items: Sequence[Question], answers: Sequence[str], positive: str = "yes") -> pd.DataFrame:
    """Accuracy, precision, recall, F1 and yes-rate by category and over all, each in [0, 1].

    Args:
        answers: raw answers, read by `parse_yes_no`.
        positive: the positive class: "yes" for POPE, "no" for AMBER.
    Returns:
        one row per category, then "all": items, the five figures (NaN for a division by zero), and `neither`: how many answers say
        neither yes nor no; they count as yes.
    Raises:
        ValueError: no items, another number of answers than items, or an item that is not a yes/no question.
    """
    if len(items) != len(answers) or not items:
        raise ValueError(f"expected an answer for each of at least one item, got {len(answers)} for {len(items)}.")
    if wrong := [item.source or item.id for item in items if item.judge != YES_NO]:
        raise ValueError(f"{len(wrong)} items are not yes/no questions, the first is {wrong[0]}.")
    table = pd.DataFrame(
        {
            "category": [item.category for item in items],
            "gold": [item.answer for item in items],
            "said": [parse_yes_no(answer) for answer in answers],
            "neither": [not says_yes_or_no(answer) for answer in answers],
        }
    )
    groups = [*table.groupby("category", sort=False), ("all", table)]
    return pd.DataFrame([{"category": name, **_yes_no_figures(rows, positive)} for name, rows in groups])


class Mention(NamedTuple):
    """An object named in a caption: the word as written, the object it means, and its range of characters."""

    word: str
    object: str
    start: int
    end: int


@dataclass(frozen=True)
class Chair(Result):
    """CHAIR over captions.

    Attributes:
        mentions: one row per mention: image, word, object, start, end, hallucinated.
        n_captions: number of captions, including those that name no object.
    """

    mentions: pd.DataFrame
    n_captions: int

    @property
    def chair_s(self) -> float:
        """Hallucinated captions / captions."""
        return self.mentions.loc[self.mentions["hallucinated"], "image"].nunique() / self.n_captions

    @property
    def chair_i(self) -> float:
        """Hallucinated mentions / mentions; NaN without mentions."""
        return float(self.mentions["hallucinated"].mean()) if len(self.mentions) else float("nan")

    def to_dataframe(self) -> pd.DataFrame:
        """One row: CHAIRs, CHAIRi and the counts they are computed from."""
        wrong = self.mentions["hallucinated"]
        return pd.DataFrame(
            [
                {
                    "captions": self.n_captions,
                    "hallucinated_captions": self.mentions.loc[wrong, "image"].nunique(),
                    "mentions": len(self.mentions),
                    "hallucinated_mentions": int(wrong.sum()),
                    "CHAIRs": self.chair_s,
                    "CHAIRi": self.chair_i,
                }
            ]
        )

    def plot(self, path: Any = None) -> Any:
        """CHAIRs and CHAIRi with their counts, and the objects that are hallucinated most often."""
        from analyses.views.hallucination import chair_plot

        return chair_plot(self, path)


def chair(items: Sequence[Question], vocabulary: Mapping[str, str]) -> Chair:
    """CHAIRs and CHAIRi of the captions in the items (`Question.given`).

    Args:
        vocabulary: word or phrase -> object (`read_synonyms`).
    Raises:
        ValueError: no captions, an image without a list of objects, or a true object that is not in the vocabulary.
    """
    if not items:
        raise ValueError("expected captions, got none.")
    rows = []
    for item in items:
        if item.judge != OBJECTS:
            raise ValueError(f"{item.source or item.id}: no list of the objects truly there; pass objects= to load_chair.")
        unknown = [name for name in item.truth if name.lower() not in vocabulary]
        if unknown:
            raise ValueError(f"{item.source or item.id}: {unknown[0]!r} is not in the vocabulary of {len(vocabulary)} words.")
        there = {vocabulary[name.lower()] for name in item.truth}
        rows += [
            {"image": item.id, **found._asdict(), "hallucinated": found.object not in there} for found in mentions(item.given, vocabulary)
        ]
    table = pd.DataFrame(rows, columns=["image", *Mention._fields, "hallucinated"]).astype({"hallucinated": bool})
    return Chair(table, len(items))


def mentions(caption: str, vocabulary: Mapping[str, str]) -> list[Mention]:
    """All mentions of objects in a caption, in order; the longest phrase wins ("hot dog" is not a dog).

    Plurals with s or es count as the singular (our choice); other plurals must be in the vocabulary.

    Raises:
        ValueError: an empty vocabulary.
    """
    if not vocabulary:
        raise ValueError("expected a vocabulary of objects, got an empty one.")
    vocabulary = {word.lower(): name for word, name in vocabulary.items()}
    phrases = sorted(vocabulary, key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, phrases))})(?:e?s)?\b", re.IGNORECASE)
    return [Mention(m[0], vocabulary[m[1].lower()], m.start(), m.end()) for m in pattern.finditer(caption)]


def read_synonyms(file: str | Path) -> dict[str, str]:
    """Reads CHAIR's file of synonyms, one object per line: all words of "person, girl, boy" mean the first.

    Raises:
        ValueError: no such file, no words, or a word that belongs to two objects (the message names the line).
    """
    words: dict[str, str] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        names = [word.strip().lower() for word in line.split(",") if word.strip()]
        for word in names:
            if words.setdefault(word, names[0]) != names[0]:
                raise ValueError(f"{file}, line {number}: {word!r} is already a word for {words[word]!r}.")
    if not words:
        raise ValueError(f"{file} has no words: expected lines such as 'person, girl, boy'.")
    return words


def _yes_no_figures(rows: pd.DataFrame, positive: str) -> dict[str, float]:
    precision, recall, f1, _ = precision_recall_fscore_support(
        rows["gold"] == positive, rows["said"] == positive, average="binary", zero_division=float("nan")
    )
    return {
        "items": len(rows),
        "accuracy": accuracy_score(rows["gold"], rows["said"]),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_rate": float((rows["said"] == "yes").mean()),
        "neither": int(rows["neither"].sum()),
    }


def _plain(text: str) -> str:
    return " ".join(text.strip().removesuffix(".").lower().split())


# ---- reading ----------------------------------------------------------------------------------------


def _load(name: str, schema: Schema, files: Path | Sequence[Path], question: Callable[[dict, int], dict], skip_bad: bool) -> Benchmark:
    """Reads every row by its schema and `question`; rows that either of them refuses, and repeated ids, are the problems."""
    items, problems, seen, unknown = [], [], {}, {}
    for file in [files] if isinstance(files, Path) else files:
        for index, (line, row) in enumerate(rows_and_errors(file)):
            if isinstance(row, ValueError):
                problems.append(str(row))
                continue
            where = f"{file}, line {line}"
            try:
                values = question(schema.read(row), index)
                if values["id"] in seen:
                    raise ValueError(f"id {values['id']} is also that of {seen[values['id']]}")
            except ValueError as error:
                problems.append(f"{where}: {error}.")
                continue
            unknown |= dict.fromkeys(schema.unknown(row)) if schema.ours else {}
            seen[values["id"]] = where
            noun = values.get("noun", object_noun(values["question"]))
            items.append(Question(**{"answer": "", **values, "noun": noun, "benchmark": name, "source": where}))
    tell_unknown(files, unknown)
    if problems and not skip_bad:
        more = f"\n… and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{len(problems)} bad rows beside {len(items)} good ones (skip_bad leaves them out):\n"
            + "\n".join(problems[:_SHOWN]) + more
        )  # fmt: skip
    if not items:
        raise ValueError(f"{files} has no {'good ' if problems else ''}rows.")
    return Benchmark(items, problems)


def _of_annotation(schema: Schema, note: Mapping, number: int) -> dict[str, Any]:
    try:
        return schema.read(note)
    except ValueError as error:
        raise ValueError(f"annotation {number} is {ascii(note)[:60]}: {error}") from error


def _boxes(row: Mapping) -> tuple[tuple[float, float, float, float], ...]:
    value = row.get("box", row.get("bbox"))
    if value is None:
        return ()
    x, y, right, bottom = value
    if "box" not in row:
        right, bottom = x + right, y + bottom
    if right <= x or bottom <= y:
        raise ValueError(f"the box {list(value)} has no area")
    return ((x, y, right, bottom),)


def _folders(images: str | Path | None, *defaults: Path) -> list[Path]:
    return [Path(images)] if images is not None else list(defaults)


def _image(folders: Sequence[Path], names: Sequence[str], check: bool) -> Path:
    """The first of the names that is a file in one of the folders."""
    if not names:
        raise ValueError("the row names no image")
    for name in names:
        for folder in folders:
            if _is_file(folder / name):
                return folder / name
    if check:
        raise ValueError(f"no image {names[0]} in {' or '.join(map(str, folders))}")
    return folders[0] / names[0]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _coco_names(name: str) -> list[str]:
    names = [name, f"{name}.jpg", f"{name}.png"]
    if name.isdigit():
        names += [f"COCO_val2014_{int(name):012d}.jpg", f"{int(name):012d}.jpg"]
    return names


def _object_lists(objects: Any) -> dict[str, Any] | None:
    if objects is None:
        return None
    given = isinstance(objects, Mapping)
    found = objects if given else read_json(objects)
    if not isinstance(found, Mapping):
        raise ValueError(f'{objects}: expected an object {{"image_id": ["dog", …]}}.')
    where = "objects" if given else str(objects)
    return {str(name): value if value is None else _objects_of(name, value, where) for name, value in found.items()}


def _objects_of(name: Any, value: Any, where: str) -> tuple[str, ...]:
    try:
        return columns.OBJECT_NAMES.read(value if isinstance(value, list) else list(value) if isinstance(value, (tuple, set)) else value)
    except ValueError as error:
        raise ValueError(f"{where}: expected of image {shown(str(name))} a list of objects' names, got {error or shown(value)}.") from error


def _amber_queries(base: Path) -> list[Path]:
    for place in (base, base / "query", base / "data" / "query"):
        if (place / "query_all.json").is_file():
            return [place / "query_all.json"]
        if found := sorted(place.glob("query_*.json")):
            return found
    raise ValueError(f"{base} has no query_*.json: pass AMBER's data folder or a query file.")
