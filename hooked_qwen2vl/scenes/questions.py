"""Questions as functions of a scene: the same question can be asked of a scene and of its counterfactual."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .scene import Scene, Thing
from .words import ABSENT, RELATIONS

Finding = tuple[str, tuple[Thing, ...]]  # an answer, and the things it depends on


@dataclass(frozen=True)
class Question:
    """A question and how to answer it.

    Attributes:
        text: as asked.
        category: one of `words.CATEGORIES`.
        group: the kind of answer, a key of `words.ANSWERS`, or "text" or "caption".
        solve: scene -> (answer, things it depends on), or None where the scene does not fit the question
            ("the star" where there are two).
    """

    text: str
    category: str
    group: str
    solve: Callable[[Scene], Finding | None]


def matching(scene: Scene, **wanted: str | int) -> list[Thing]:
    """Things with the given attributes; a None matches anything."""
    return [t for t in scene.things if all(v is None or getattr(t, k) == v for k, v in wanted.items())]


def only(scene: Scene, **wanted: str | int) -> Thing | None:
    """The one thing with the given attributes; None where there is none or more than one."""
    found = matching(scene, **wanted)
    return found[0] if len(found) == 1 else None


def neighbor(scene: Scene, anchor: Thing, relation: str) -> Thing | None:
    """The one thing that touches `anchor` on that side; None where there is none or more than one."""
    found = [thing for thing in scene.things if thing is not anchor and touches(thing, anchor, relation)]
    return found[0] if len(found) == 1 else None


def touches(thing: Thing, anchor: Thing, relation: str) -> bool:
    """Whether `thing` is right beside `anchor`, e.g. "left of" it, sharing a row (or a column)."""
    share_row = thing.row < anchor.row + anchor.rows and anchor.row < thing.row + thing.rows
    share_col = thing.col < anchor.col + anchor.cols and anchor.col < thing.col + thing.cols
    return {
        "left of": share_row and thing.col + thing.cols == anchor.col,
        "right of": share_row and anchor.col + anchor.cols == thing.col,
        "above": share_col and thing.row + thing.rows == anchor.row,
        "below": share_col and anchor.row + anchor.rows == thing.row,
    }[relation]


def on_side(thing: Thing, anchor: Thing, relation: str) -> bool:
    """Whether `thing` lies wholly on that side of `anchor`, near or far, in whatever row (or column)."""
    return {
        "left of": thing.col + thing.cols <= anchor.col,
        "right of": anchor.col + anchor.cols <= thing.col,
        "above": thing.row + thing.rows <= anchor.row,
        "below": anchor.row + anchor.rows <= thing.row,
    }[relation]


# ---- question forms that several domains share ------------------------------------------------------


def attribute(text: str, group: str, field: str, category: str = "attribute", **wanted) -> Question:
    """Asks for one attribute of the one thing that matches."""

    def solve(scene: Scene) -> Finding | None:
        thing = only(scene, **wanted)
        return (str(getattr(thing, field)), (thing,)) if thing else None

    return Question(text, category, group, solve)


def absence(text: str, group: str, field: str, **wanted) -> Question:
    """The attribute of the one thing that matches, asked where there may be none: "none", which depends on what matches in part."""
    asked = attribute(text, group, field, category="absence", **wanted)

    def solve(scene: Scene) -> Finding | None:
        return asked.solve(scene) if matching(scene, **wanted) else (ABSENT, _in_part(scene, wanted))

    return Question(text, "absence", group, solve)


def no_neighbor(asked: Question, side: str, **anchor) -> Question:
    """A relation asked where nothing may touch the anchor on that side: "none", which depends on the anchor."""

    def solve(scene: Scene) -> Finding | None:
        start = only(scene, **anchor)
        if start and not any(touches(thing, start, side) for thing in scene.things):
            return ABSENT, (start,)
        return asked.solve(scene)

    return Question(asked.text, "absence", asked.group, solve)


def _in_part(scene: Scene, wanted: dict) -> tuple[Thing, ...]:
    return tuple(t for t in scene.things if any(getattr(t, k) == v for k, v in wanted.items()))


def existence(text: str, **wanted) -> Question:
    """Asks whether anything matches; a "no" depends on the things that match in part."""

    def solve(scene: Scene) -> Finding:
        found = matching(scene, **wanted)
        if found:
            return "yes", tuple(found)
        return "no", _in_part(scene, wanted)

    return Question(text, "existence", "truth", solve)


def count(text: str, kinds: Iterable[str] | None = None, **wanted) -> Question:
    """Asks how many match, 0 to 9."""
    kinds = None if kinds is None else frozenset(kinds)

    def solve(scene: Scene) -> Finding | None:
        found = [t for t in matching(scene, **wanted) if kinds is None or t.kind in kinds]
        return (str(len(found)), tuple(found)) if len(found) < 10 else None

    return Question(text, "count", "number", solve)


def relation(text: str, group: str, field: str, side: str, **anchor) -> Question:
    """Two hops: find the anchor, then the thing beside it, and tell one of its attributes."""

    def solve(scene: Scene) -> Finding | None:
        start = only(scene, **anchor)
        end = neighbor(scene, start, side) if start else None
        return (getattr(end, field), (end, start)) if start and end else None

    return Question(text, "relation", group, solve)


def bigger(text: str, first: dict, second: dict) -> Question:
    """Asks whether the first thing covers more cells than the second."""

    def solve(scene: Scene) -> Finding | None:
        a, b = only(scene, **first), only(scene, **second)
        if a is None or b is None or a is b:
            return None
        return ("yes" if len(a.cells) > len(b.cells) else "no"), (a, b)

    return Question(text, "comparison", "truth", solve)


def background() -> Question:
    """Asks for the background's colour."""
    return Question("What color is the background?", "environment", "background", lambda s: (s.background, (s.backdrop,)))


def caption(phrase: Callable[[Thing], str]) -> Question:
    """Asks for all things, in raster order."""
    return Question("Describe the image.", "caption", "caption", lambda s: (" , ".join(map(phrase, s.things)), s.things))


def beside(scene: Scene) -> list[tuple[Thing, Thing, str]]:
    """(thing, anchor, relation) for every pair of neighbours."""
    return [
        (thing, anchor, side)
        for thing in scene.things
        for anchor in scene.things
        if thing is not anchor
        for side in RELATIONS
        if touches(thing, anchor, side)
    ]


# ---- answers in sentences ---------------------------------------------------------------------------

IN_WORDS = "Answer in words."  # what a question ends with that is to be answered by a sentence


def a(words: str) -> str:
    """With its indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def in_words(question: str, answer: str) -> tuple[str, str] | None:
    """The question that asks for a sentence, and that sentence; None for a form of question that has none.

    "What color is the star?", "red" -> "What color is the star? Answer in words.", "The star is red."
    """
    for pattern, sentence in _SENTENCES:
        if found := re.fullmatch(pattern, question):
            said = "There is none." if answer == ABSENT else sentence(answer, *found.groups())
            return f"{question} {IN_WORDS}", said
    return None


def _there(answer: str, verb: str, article: str | None, what: str) -> str:
    verb = verb.lower()
    return f"Yes, there {verb} {article or ''}{what}." if answer == "yes" else f"No, there {verb} no {what}."


_SENTENCES: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"What (?:color|size) (is|are) the (.+)\?", lambda answer, verb, what: f"The {what} {verb} {answer}."),
    (r"How tall is the (.+)\?", lambda answer, what: f"The {what} is {answer} high."),
    (r"What shape is (.+)\?", lambda answer, where: f"A {answer} is {where}."),
    (r"What pattern is (.+)\?", lambda answer, where: f"The {answer} are {where}."),
    (r"What (letter|digit) is (.+)\?", lambda answer, sort, where: f"The {sort} {answer} is {where}."),
    (r"How many (.+) are there\?", lambda answer, what: f"The number of {what} is {answer}."),
    (r"(Is|Are) there (an? )?(.+)\?", _there),
    (r"Which way does the (.+) point\?", lambda answer, what: f"The {what} points {answer}."),
    (r"Which bar is (.+)\?", lambda answer, how: f"The {answer} bar is {how}."),
    (r"Which digit is (.+)\?", lambda answer, how: f"The digit {answer} is {how}."),
)
