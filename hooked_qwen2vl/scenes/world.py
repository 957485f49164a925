"""The world's items: a picture, a question, its answer, and all that is known about why.

seed ─► scene (until it belongs to the split) ─► question ─► answer and the things it depends on
                                                     └─► the same question of a scene with one attribute changed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from PIL import Image

from .domains import DOMAINS, edits
from .drawing import render
from .questions import Question, on_side, touches
from .scene import Scene, Thing, typical_color
from .words import ABSENT, ANSWERS, BACKGROUNDS, CATEGORIES, RELATIONS
from .words import DOMAINS as DOMAIN_NAMES

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")
GRIDS = ((6, 6), (4, 4), (4, 6), (6, 4), (5, 5), (5, 7), (7, 5), (6, 8), (4, 8))  # rows, cols
MAX_LEVEL = 5
ON_REQUEST = ("caption", "absence")  # categories that `sample` gives only where asked for
_TRIES = 400


@dataclass(frozen=True)
class Item:
    """A picture with a question whose answer, and whose reason, is known.

    Attributes:
        image: RGB, 28 pixels a cell.
        question, answer: as the model is asked and should answer.
        category, domain: one of `words.CATEGORIES`, one of `words.DOMAINS`.
        objects: everything in the picture, in raster order.
        depends_on: what the answer depends on, the thing asked for first; for an environment question the
            background as one thing that covers every cell.
        typical: whether the shape asked for (the first it depends on) wears its typical colour; None outside
            the domain `shapes` and where what is asked for is not there.
        counterfactual: the same question of the same scene with one attribute of one object changed, its
            answer different; None where no single change does that ("How many bars are there?").
        changed: (before, after): the object that differs from the original, on counterfactuals only.
        caption: the objects truly there, in words.
        candidates: the answers of this kind, "none" among them where the thing asked for may be absent; () for texts
            and captions.
        unseen: whether it depends on a combination of kind, colour and quadrant kept out of training.
        split: the split the scene belongs to.
        grid: (rows, cols) in cells.
        scene: the full description.
    """

    image: Image.Image = field(repr=False)
    question: str
    answer: str
    category: str
    domain: str
    objects: tuple[Thing, ...]
    depends_on: tuple[Thing, ...]
    typical: bool | None
    counterfactual: Item | None = field(repr=False)
    changed: tuple[Thing, Thing] | None
    caption: str
    candidates: tuple[str, ...]
    unseen: bool
    split: str
    grid: tuple[int, int]
    scene: Scene = field(repr=False)


def sample(
    n: int = 1,
    seed: int = 0,
    split: str = "test",
    domain: str | None = None,
    category: str | None = None,
    grid: tuple[int, int] | None = None,
    level: int = MAX_LEVEL,
    start: int = 0,
) -> list[Item]:
    """n items, the same for the same arguments; domains and their categories in turn.

    Args:
        start: number of the first item, so that a long list can be made in pieces.
        split: "train", "validation" or "test"; no scene is in two.
        domain, category: restrict to one; captions, and questions about what is not there ("absence", answered by
            "none"), come only where asked for.
        grid: (rows, cols) in cells; by default half are 6×6 and half of other, mostly non-square sizes.
        level: 1 (one object) to 5 (up to six).
    Raises:
        ValueError: an unknown name, a domain without that category, or a grid or level out of range.
    """
    domains = _domains(domain, category)
    _check(n, split, grid, level)
    items = []
    for index in range(start, start + n):
        rng = Random(f"{seed} {index} {split} {domain} {category} {grid} {level}")
        name = domains[(index + seed) % len(domains)]
        kinds = [k for k in DOMAINS[name].asks if k not in ON_REQUEST]
        kind = category or kinds[((index + seed) // len(domains)) % len(kinds)]
        items.append(_make_item(rng, name, kind, split, grid, level))
    return items


def counterfactual_pairs(n: int = 1, seed: int = 0, **restrictions) -> list[tuple[Item, Item]]:
    """n pairs (item, its counterfactual): one grid, one question, two different answers of one token each.

    Args:
        restrictions: as for `sample`.
    Raises:
        ValueError: as `sample`, or the kind of question has no such pairs.
    """
    pairs: list[tuple[Item, Item]] = []
    for chunk in range(50):
        for item in sample(n, seed + 1000 * chunk, **restrictions):
            if item.counterfactual and item.candidates:
                pairs.append((item, item.counterfactual))
        if len(pairs) >= n:
            return pairs[:n]
    raise ValueError(f"found only {len(pairs)} of {n} counterfactual pairs for {restrictions}.")


def load_split(name: str, n: int | None = None) -> list[Item]:
    """The first n items of a split (by default 2,000 of train, 500 of validation, 1,000 of test).

    Raises:
        ValueError: not "train", "validation" or "test".
    """
    sizes = dict(zip(SPLITS, (2000, 500, 1000)))
    if name not in sizes:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {name!r}.")
    return sample(sizes[name] if n is None else n, seed=0, split=name)


def to_frame(items: Sequence[Item]) -> pd.DataFrame:
    """One row an item: what is asked and known, without the pixels; boxes in original pixels."""
    import pandas as pd

    return pd.DataFrame(
        {
            "question": item.question,
            "answer": item.answer,
            "category": item.category,
            "domain": item.domain,
            "typical": item.typical,
            "unseen": item.unseen,
            "split": item.split,
            "rows": item.grid[0],
            "cols": item.grid[1],
            "n_objects": len(item.objects),
            "boxes": [thing.box for thing in item.depends_on],
            "counterfactual_answer": item.counterfactual.answer if item.counterfactual else None,
            "caption": item.caption,
        }
        for item in items
    )


def single_hops(item: Item, seed: int = 0) -> tuple[Item, Item]:
    """The hops of a relation question, asked for themselves: the anchor is found, and its neighbour is read.

    First an attribute of the anchor, then what the relation asks, of the neighbour named by itself ("What shape is
    blue?"). Where no attribute question of the world singles a thing out (bars have only a colour and a height), it is
    asked whether it is there.

    Raises:
        ValueError: not a relation question.
    """
    if item.category != "relation":
        raise ValueError(f"expected a relation question, which has two hops, got one of category {item.category!r}: {item.question}")
    neighbor, anchor = item.depends_on
    rng = Random(f"{seed} {item.question} {item.scene.key}")
    first, second = (_ask_of(rng, item.scene, thing, answer) for thing, answer in ((anchor, None), (neighbor, item.answer)))
    return first, second


def _ask_of(rng: Random, scene: Scene, thing: Thing, answer: str | None) -> Item:
    """A question that depends on this thing (and on nothing unlike it), with this answer where there is one."""
    domain = DOMAINS[scene.domain]
    forms = [domain.asks[c] for c in ("attribute", "ocr") if c in domain.asks] + [domain.hops, domain.asks["existence"]]
    for some in forms:
        for ask in list(some) * 100:
            question = ask(scene, rng)
            found = question and question.solve(scene)
            alike = found and {(t.kind, t.color) for t in found[1]} == {(thing.kind, thing.color)}
            if question and found and alike and found[0] in ("yes", answer or found[0]):
                return _item(scene, question, None, None)
    raise ValueError(f"no question of {scene.domain} scenes singles out the {thing.color} {thing.kind}.")


def shortcuts(scene: Scene, depends_on: tuple[Thing, ...], question: str, candidates: Sequence[str]) -> dict[str, list[Thing]]:
    """What a model might choose among that took half of a relation question: the things on the asked side of the
    anchor, its neighbours on any side, and all other things of the scene (for a path: the shapes at its ends); only
    such as the question could be about (no digit where a letter is asked for).

    Args:
        depends_on: the thing asked for, and the anchor.
        candidates: the answers of this kind.
    """
    target, anchor = depends_on
    others = [t for t in scene.things if t != anchor and {t.kind, t.color} & set(candidates)]
    side = next((side for side in RELATIONS if f" {side} " in question), None)
    if side is None:
        return {"on that side": [target], "neighbors": others, "others": others}
    return {
        "on that side": [t for t in others if on_side(t, anchor, side)],
        "neighbors": [t for t in others if any(touches(t, anchor, each) for each in RELATIONS)],
        "others": others,
    }


def tempting(scene: Scene, question: Question) -> bool:
    """Whether a relation question cannot be answered by its side or by its neighbourhood alone."""
    solved = question.solve(scene)
    assert solved is not None  # the question was asked because it has an answer here
    found = shortcuts(scene, solved[1], question.text, ANSWERS[question.group])
    return len(found["on that side"]) > 1 or len(found["neighbors"]) > 1


def dialogue(item: Item, turns: int = 3, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a dialogue about the item's picture that come before its own question.

    Raises:
        ValueError: fewer than two turns, of which the item's question is the last.
    """
    if turns < 2:
        raise ValueError(f"a dialogue has at least 2 turns, the item's own question being the last; got {turns}.")
    rng = Random(f"{seed} {item.question} {item.scene.key}")
    asked = make_dialogue(rng, item.scene, item.question, turns)
    return tuple((question.text, found[0]) for question in asked if (found := question.solve(item.scene)))


def make_dialogue(rng: Random, scene: Scene, last: str, turns: int) -> list[Question]:
    """turns - 1 questions about the scene, none of them the last one."""
    categories = [c for c in DOMAINS[scene.domain].asks if c not in ON_REQUEST]
    earlier: list[Question] = []
    while len(earlier) < turns - 1:
        question = make_question(rng, scene, rng.choice(categories))
        if question and question.text != last and question.group in ANSWERS:
            earlier.append(question)
    return earlier


# ---- scenes -----------------------------------------------------------------------------------------


def make_scene(rng: Random, domain: str, split: str, grid: tuple[int, int], level: int = MAX_LEVEL) -> Scene:
    """A scene of the split: drawn until its content falls there and, but for test, nothing unseen is in it."""
    while True:
        things = DOMAINS[domain].build(rng, *grid, level)
        things.sort(key=lambda t: (t.row, t.col, t.kind))
        scene = Scene(domain, *grid, rng.choice(BACKGROUNDS), tuple(things), rng.getrandbits(24))
        if things and scene.split == split and scene.fits() and (split == "test" or not scene.has_unseen()):
            return scene


def make_question(rng: Random, scene: Scene, category: str) -> Question | None:
    """A question of the category that the scene answers; None where it has none."""
    question = rng.choice(DOMAINS[scene.domain].asks[category])(scene, rng)
    return question if question and question.solve(scene) else None


def make_counterfactual(rng: Random, scene: Scene, question: Question) -> tuple[Scene, Thing, Thing] | None:
    """(changed scene, thing before, thing after): one attribute of one thing changed, and another answer.

    The partner of a training scene is a training scene, that of a held-out scene is held out.
    """
    found = question.solve(scene)
    assert found is not None  # the question was asked because it has an answer here
    answer, depends_on = found
    allowed = scene.split == "test"
    trained = scene.split == "train"
    for things in (depends_on, scene.things):
        for old in sorted(things, key=lambda _: rng.random()):
            options = edits(scene, old)
            rng.shuffle(options)
            for new in options:
                other = scene.exchange(old, new)
                if (other.split == "train") != trained or not other.fits():
                    continue
                found = question.solve(other)
                if found and found[0] != answer and (allowed or not other.has_unseen()):
                    return other, old, new
    return None


def pick_grid(rng: Random) -> tuple[int, int]:
    """(rows, cols): half of the time 6×6."""
    return GRIDS[0] if rng.random() < 0.5 else rng.choice(GRIDS[1:])


def _make_item(rng: Random, domain: str, category: str, split: str, grid, level: int) -> Item:
    for _ in range(_TRIES):
        scene = make_scene(rng, domain, split, grid or pick_grid(rng), level)
        question = make_question(rng, scene, category)
        if question is None:
            continue
        partner = make_counterfactual(rng, scene, question)
        if partner is None and category != "count" and question.group in ANSWERS:
            continue
        counterfactual = None
        if partner is not None:
            other, before, after = partner
            counterfactual = _item(other, question, None, (before, after))
        return _item(scene, question, counterfactual, None)
    raise ValueError(f"no {category} question found for {domain} scenes of grid {grid} at level {level}.")


def _item(scene: Scene, question: Question, counterfactual: Item | None, changed) -> Item:
    found = question.solve(scene)
    assert found is not None  # the question was asked because it has an answer here
    answer, depends_on = found
    first = depends_on[0] if depends_on else None
    absent = answer in ("no", "0", ABSENT)
    usual = typical_color(first.kind) if first and not absent and scene.domain == "shapes" else None
    return Item(
        image=render(scene),
        question=question.text,
        answer=answer,
        category=question.category,
        domain=scene.domain,
        objects=scene.things,
        depends_on=depends_on,
        typical=None if usual is None else first.color == usual,
        counterfactual=counterfactual,
        changed=changed,
        caption=DOMAINS[scene.domain].asks["caption"][0](scene, Random(0)).solve(scene)[0],
        candidates=ANSWERS.get(question.group, ()) + ((ABSENT,) if question.category == "absence" else ()),
        unseen=any(scene.is_unseen(thing) for thing in depends_on),
        split=scene.split,
        grid=(scene.rows, scene.cols),
        scene=scene,
    )


def _domains(domain: str | None, category: str | None) -> list[str]:
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"expected a domain of {', '.join(DOMAIN_NAMES)}, got {domain!r}.")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"expected a category of {', '.join(CATEGORIES)}, got {category!r}.")
    found = [d for d in ([domain] if domain else DOMAIN_NAMES) if category is None or category in DOMAINS[d].asks]
    if not found:
        raise ValueError(f"the domain {domain!r} has no {category} questions, only {', '.join(DOMAINS[str(domain)].asks)}.")
    return found


def _check(n: int, split: str, grid: tuple[int, int] | None, level: int) -> None:
    if n < 0:
        raise ValueError(f"expected a number of items of at least 0, got {n}.")
    if split not in SPLITS:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {split!r}.")
    if grid is not None and not all(4 <= side <= 8 for side in grid):
        raise ValueError(f"expected a grid of 4 to 8 rows and columns, got {grid}.")
    if not 1 <= level <= MAX_LEVEL:
        raise ValueError(f"expected a level of 1 to {MAX_LEVEL}, got {level}.")
