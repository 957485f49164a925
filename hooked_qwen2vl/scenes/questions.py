"""Questions as functions of a scene: the same question can be asked of a scene and of its counterfactual."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .scene import Scene, Thing
from .words import RELATIONS

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


# ---- question forms that several domains share ------------------------------------------------------


def attribute(text: str, group: str, field: str, category: str = "attribute", **wanted) -> Question:
    """Asks for one attribute of the one thing that matches."""

    def solve(scene: Scene) -> Finding | None:
        thing = only(scene, **wanted)
        return (str(getattr(thing, field)), (thing,)) if thing else None

    return Question(text, category, group, solve)


def existence(text: str, **wanted) -> Question:
    """Asks whether anything matches; a "no" depends on the things that match in part."""

    def solve(scene: Scene) -> Finding:
        found = matching(scene, **wanted)
        if found:
            return "yes", tuple(found)
        return "no", tuple(t for t in scene.things if any(getattr(t, k) == v for k, v in wanted.items()))

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
