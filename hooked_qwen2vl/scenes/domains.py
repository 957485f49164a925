"""The five visual domains: how each builds a scene, what it asks, and what a counterfactual may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from . import questions as q
from .questions import Question
from .scene import BACKGROUND, Cell, Scene, Thing, typical_color
from .words import ABSENT, BACKGROUNDS, COLORS, DIGITS, DIRECTIONS, LETTERS, ORIENTATIONS, PATTERNS, PLURAL, RELATIONS, SHAPES

TYPICAL_RATE = 0.7  # how often a shape is given its typical colour; chance adds a sixth of the rest
Ask = Callable[[Scene, Random], Question | None]


@dataclass(frozen=True)
class Domain:
    """A kind of picture.

    Attributes:
        build: (rng, rows, cols, level) -> things; level 1..5 bounds their number.
        asks: category -> the forms of question it has; each returns None where the scene has nothing to ask.
        edits: (scene, thing) -> the same thing with one attribute changed, in every way.
        hops: forms that `sample` never asks, for things that no other form singles out (see `world.single_hops`).
    """

    build: Callable[[Random, int, int, int], list[Thing]]
    asks: dict[str, tuple[Ask, ...]]
    edits: Callable[[Scene, Thing], list[Thing]]
    hops: tuple[Ask, ...] = ()


def edits(scene: Scene, thing: Thing) -> list[Thing]:
    """The thing (or the background) with one attribute changed, in every way its domain allows."""
    if thing.kind == BACKGROUND:
        return [replace(thing, color=color) for color in BACKGROUNDS if color != thing.color]
    return [new for new in DOMAINS[scene.domain].edits(scene, thing) if new != thing]


# ---- placing ----------------------------------------------------------------------------------------


def _scatter(rng: Random, rows: int, cols: int, n: int, make: Callable[[], tuple[str, str, str]], big: float):
    """Up to n things that do not overlap, most of them beside another; `make` gives kind, colour, facing."""
    things: list[Thing] = []
    taken: set[Cell] = set()
    for _ in range(n):
        kind, color, facing = make()
        for _ in range(12):
            side = 2 if rng.random() < big else 1
            if things and rng.random() < 0.6:
                a = rng.choice(things)
                row, col = rng.choice([(a.row, a.col - side), (a.row, a.col + a.cols), (a.row - side, a.col), (a.row + a.rows, a.col)])
            else:
                row, col = rng.randrange(rows - side + 1), rng.randrange(cols - side + 1)
            thing = Thing(kind, color, row, col, side, side, facing)
            inside = row >= 0 and col >= 0 and row + side <= rows and col + side <= cols
            if inside and not taken & thing.cells:
                things.append(thing)
                taken |= thing.cells
                break
    return things


def _recolored(thing: Thing) -> list[Thing]:
    return [replace(thing, color=color) for color in COLORS]


def _resized(scene: Scene, thing: Thing) -> list[Thing]:
    side = 3 - thing.rows
    return [new] if scene.exchange(thing, new := replace(thing, rows=side, cols=side)).fits() else []


def _background(scene: Scene, rng: Random) -> Question:
    return q.background()


def _any(scene: Scene, rng: Random) -> Thing:
    return rng.choice(scene.things)


def _missing(scene: Scene, rng: Random, kinds: tuple[str, ...], of_kind: str, of_color: str, group: str) -> Question | None:
    """The colour of a kind, or the kind of a colour, that is not in the picture; None where every one is."""
    absent = [k for k in kinds if not q.matching(scene, kind=k)]
    colors = [c for c in COLORS if not q.matching(scene, color=c)]
    if absent and (rng.random() < 0.5 or not colors):
        kind = rng.choice(absent)
        return q.absence(of_kind.format(kind), "color", "color", kind=kind)
    if not colors:
        return None
    color = rng.choice(colors)
    return q.absence(of_color.format(color), group, "kind", color=color)


# ---- shapes -----------------------------------------------------------------------------------------


def _shape_color(rng: Random, kind: str) -> str:
    return str(typical_color(kind)) if rng.random() < TYPICAL_RATE else rng.choice(COLORS)


def _build_shapes(rng: Random, rows: int, cols: int, level: int) -> list[Thing]:
    few = rng.random() < 0.3  # few kinds: several of each, to count
    kinds = rng.sample(SHAPES, 2) if few else SHAPES

    def make() -> tuple[str, str, str]:
        kind = rng.choice(kinds)
        return kind, _shape_color(rng, kind), ""

    return _scatter(rng, rows, cols, rng.randint(1, level + (level > 3)), make, big=0.35)


def _shape_phrase(thing: Thing) -> str:
    return f"a {thing.size} {thing.color} {thing.kind}"


def _ask_shape_color(scene: Scene, rng: Random) -> Question:
    kind = _any(scene, rng).kind
    return q.attribute(f"What color is the {kind}?", "color", "color", kind=kind)


def _ask_sized_shape_color(scene: Scene, rng: Random) -> Question:
    t = _any(scene, rng)
    return q.attribute(f"What color is the {t.size} {t.kind}?", "color", "color", kind=t.kind, size=t.size)


def _ask_shape(scene: Scene, rng: Random) -> Question:
    color = _any(scene, rng).color
    return q.attribute(f"What shape is {color}?", "shape", "kind", color=color)


def _ask_shape_size(scene: Scene, rng: Random) -> Question:
    kind = _any(scene, rng).kind
    return q.attribute(f"What size is the {kind}?", "size", "size", kind=kind)


def _ask_shape_exists(scene: Scene, rng: Random) -> Question:
    t = _any(scene, rng)
    kind, color = t.kind, t.color
    if rng.random() < 0.5:
        absent = [(k, c) for k in SHAPES for c in COLORS if not q.matching(scene, kind=k, color=c)]
        near = [(k, c) for k, c in absent if (k == kind) != (c == color)]
        plain = [(k, c) for k, c in absent if c == typical_color(k)]
        kind, color = rng.choice(rng.choice([group for group in (near, plain, absent) if group]))
    return q.existence(f"Is there {q.a(color)} {kind}?", kind=kind, color=color)


def _ask_kind_exists(scene: Scene, rng: Random) -> Question | None:
    present = sorted({t.kind for t in scene.things})
    kinds = present if rng.random() < 0.5 else [k for k in SHAPES if k not in present]
    return q.existence(f"Is there a {kind}?", kind=kind) if kinds and (kind := rng.choice(kinds)) else None


def _ask_shape_count(scene: Scene, rng: Random) -> Question:
    kind = _any(scene, rng).kind if rng.random() < 0.8 else rng.choice(SHAPES)
    return q.count(f"How many {PLURAL[kind]} are there?", kind=kind)


def _ask_color_count(scene: Scene, rng: Random) -> Question:
    color = _any(scene, rng).color if rng.random() < 0.8 else rng.choice(COLORS)
    return q.count(f"How many {color} shapes are there?", color=color)


def _ask_all_count(scene: Scene, rng: Random) -> Question:
    return q.count("How many shapes are there?")


def _ask_shape_beside(scene: Scene, rng: Random) -> Question | None:
    if not (pairs := q.beside(scene)):
        return None
    _, anchor, side = rng.choice(pairs)
    if rng.random() < 0.5 and q.only(scene, kind=anchor.kind):
        phrase, wanted = anchor.kind, {"kind": anchor.kind}
    else:
        phrase, wanted = f"{anchor.color} {anchor.kind}", {"kind": anchor.kind, "color": anchor.color}
    if rng.random() < 0.5:
        return q.relation(f"What shape is {side} the {phrase}?", "shape", "kind", side, **wanted)
    return q.relation(f"What color is the shape {side} the {phrase}?", "color", "color", side, **wanted)


def _ask_bigger_shape(scene: Scene, rng: Random) -> Question | None:
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    if a.kind == b.kind:
        return None
    return q.bigger(f"Is the {a.kind} bigger than the {b.kind}?", {"kind": a.kind}, {"kind": b.kind})


def _ask_missing_shape(scene: Scene, rng: Random) -> Question | None:
    return _missing(scene, rng, SHAPES, "What color is the {}?", "What shape is {}?", "shape")


def _ask_no_shape_beside(scene: Scene, rng: Random) -> Question | None:
    anchor, side = _any(scene, rng), rng.choice(RELATIONS)
    if any(q.touches(t, anchor, side) for t in scene.things) or not q.only(scene, kind=anchor.kind):
        return None
    text = f"What shape is {side} the {anchor.kind}?"
    return q.no_neighbor(q.relation(text, "shape", "kind", side, kind=anchor.kind), side, kind=anchor.kind)


def _edit_shape(scene: Scene, thing: Thing) -> list[Thing]:
    return _recolored(thing) + [replace(thing, kind=kind) for kind in SHAPES] + _resized(scene, thing)


# ---- glyphs -----------------------------------------------------------------------------------------


def _build_glyphs(rng: Random, rows: int, cols: int, level: int) -> list[Thing]:
    if level > 1 and rng.random() < 0.25:  # a line of text
        n = min(rng.randint(2, 4), cols)
        row, first, color = rng.randrange(rows), rng.randrange(cols - n + 1), rng.choice(COLORS)
        glyphs = rng.sample(LETTERS + DIGITS, n)
        return [Thing(glyph, color, row, first + i) for i, glyph in enumerate(glyphs)]
    glyphs = iter(rng.sample(LETTERS, len(LETTERS)) if rng.random() < 0.2 else rng.sample(LETTERS + DIGITS * 2, 16))
    unique: set[str] = set()

    def make() -> tuple[str, str, str]:
        glyph = next(g for g in glyphs if g not in unique)
        unique.add(glyph)
        return glyph, rng.choice(COLORS), ""

    return _scatter(rng, rows, cols, rng.randint(1, level), make, big=0.3)


def _sort(glyph: str) -> str:
    return "letter" if glyph in LETTERS else "digit"


def _glyph_phrase(thing: Thing) -> str:
    return f"{q.a(thing.color)} {thing.kind}"


def _kin(glyph: str) -> tuple[str, ...]:
    return LETTERS if glyph in LETTERS else DIGITS


def _read(text: str, sort: str, **wanted) -> Question:
    """Asks for the one letter (or digit) that matches."""
    kinds = LETTERS if sort == "letter" else DIGITS

    def solve(scene: Scene) -> q.Finding | None:
        found = [t for t in q.matching(scene, **wanted) if t.kind in kinds]
        return (found[0].kind, (found[0],)) if len(found) == 1 else None

    return Question(text, "ocr", sort, solve)


def _ask_glyph_in_line(scene: Scene, rng: Random) -> Question | None:
    lines = {
        "top row": {"row": 0, "rows": 1}, "bottom row": {"row": scene.rows - 1, "rows": 1},
        "left column": {"col": 0, "cols": 1}, "right column": {"col": scene.cols - 1, "cols": 1},
    }  # fmt: skip
    options = [(t, name) for name, wanted in lines.items() for t in q.matching(scene, **wanted)]
    if not options:
        return None
    thing, name = rng.choice(options)
    return _read(f"What {_sort(thing.kind)} is in the {name}?", _sort(thing.kind), **lines[name])


def _ask_colored_glyph(scene: Scene, rng: Random) -> Question:
    t = _any(scene, rng)
    return _read(f"What {_sort(t.kind)} is {t.color}?", _sort(t.kind), color=t.color)


def _ask_sized_glyph(scene: Scene, rng: Random) -> Question:
    t = _any(scene, rng)
    return _read(f"What {_sort(t.kind)} is {t.size}?", _sort(t.kind), size=t.size)


def _ask_text(scene: Scene, rng: Random) -> Question | None:
    def solve(scene: Scene) -> q.Finding | None:
        things = scene.things
        in_line = all(b.row == a.row and b.col == a.col + 1 and b.size == "small" for a, b in zip(things, things[1:]))
        return ("".join(t.kind for t in things), things) if in_line and len(things) > 1 else None

    return Question("Read the text.", "ocr", "text", solve)


def _ask_glyph_color(scene: Scene, rng: Random) -> Question:
    kind = _any(scene, rng).kind
    return q.attribute(f"What color is the {_sort(kind)} {kind}?", "color", "color", kind=kind)


def _ask_glyph_size(scene: Scene, rng: Random) -> Question:
    kind = _any(scene, rng).kind
    return q.attribute(f"What size is the {_sort(kind)} {kind}?", "size", "size", kind=kind)


def _ask_glyph_exists(scene: Scene, rng: Random) -> Question:
    kind = _any(scene, rng).kind
    if rng.random() < 0.5:
        kind = rng.choice([k for k in LETTERS + DIGITS if not q.matching(scene, kind=k)])
    return q.existence(f"Is there a {_sort(kind)} {kind}?", kind=kind)


def _ask_glyph_count(scene: Scene, rng: Random) -> Question:
    sort = rng.choice(("letter", "digit"))
    return q.count(f"How many {sort}s are there?", LETTERS if sort == "letter" else DIGITS)


def _ask_glyph_beside(scene: Scene, rng: Random) -> Question | None:
    if not (pairs := q.beside(scene)):
        return None
    thing, anchor, side = rng.choice(pairs)
    sort, name = _sort(thing.kind), f"{_sort(anchor.kind)} {anchor.kind}"
    text = f"What {sort} is {side} the {name}?"
    asked = q.relation(text, sort, "kind", side, kind=anchor.kind)

    def solve(scene: Scene) -> q.Finding | None:
        found = asked.solve(scene)
        return found if found and _sort(found[0]) == sort else None

    return replace(asked, solve=solve)


def _ask_greater_digit(scene: Scene, rng: Random) -> Question:
    largest = rng.random() < 0.5

    def solve(scene: Scene) -> q.Finding | None:
        digits = [t for t in scene.things if t.kind in DIGITS]
        if len(digits) < 2 or len({t.kind for t in digits}) < len(digits):
            return None
        return (max if largest else min)(t.kind for t in digits), tuple(digits)

    return Question(f"Which digit is {'highest' if largest else 'lowest'}?", "comparison", "digit", solve)


def _ask_missing_glyph(scene: Scene, rng: Random) -> Question | None:
    if rng.random() < 0.5:
        kind = rng.choice([k for k in LETTERS + DIGITS if not q.matching(scene, kind=k)])
        return q.absence(f"What color is the {_sort(kind)} {kind}?", "color", "color", kind=kind)
    colors = [c for c in COLORS if not q.matching(scene, color=c)]
    if not colors:
        return None
    color, sort = rng.choice(colors), rng.choice(("letter", "digit"))
    asked = _read(f"What {sort} is {color}?", sort, color=color)

    def solve(scene: Scene) -> q.Finding | None:
        return asked.solve(scene) if q.matching(scene, color=color) else (ABSENT, ())

    return replace(asked, category="absence", solve=solve)


def _edit_glyph(scene: Scene, thing: Thing) -> list[Thing]:
    others = [k for k in _kin(thing.kind) if not q.matching(scene, kind=k)]
    return _recolored(thing) + [replace(thing, kind=kind) for kind in others] + _resized(scene, thing)


# ---- charts -----------------------------------------------------------------------------------------


def _build_charts(rng: Random, rows: int, cols: int, level: int) -> list[Thing]:
    n = rng.randint(min(2, level), min(cols, 6, 1 + level))
    first, colors = rng.randrange(cols - n + 1), rng.sample(COLORS, n)
    highest = min(rows, 6)
    heights = rng.sample(range(1, highest + 1), n) if n <= highest and rng.random() < 0.5 else None
    heights = heights or [rng.randint(1, highest) for _ in range(n)]
    return [Thing("bar", colors[i], rows - h, first + i, h, 1) for i, h in enumerate(heights)]


def _ask_extreme_bar(scene: Scene, rng: Random) -> Question:
    tallest = rng.random() < 0.5

    def solve(scene: Scene) -> q.Finding | None:
        heights = [t.rows for t in scene.things]
        extreme = (max if tallest else min)(heights)
        if len(heights) < 2 or heights.count(extreme) > 1:
            return None
        first = scene.things[heights.index(extreme)]
        return first.color, (first, *(t for t in scene.things if t is not first))

    return Question(f"Which bar is {'tallest' if tallest else 'shortest'}?", "comparison", "color", solve)


def _ask_taller_bar(scene: Scene, rng: Random) -> Question | None:
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    text = f"Is the {a.color} bar taller than the {b.color} bar?"
    return q.bigger(text, {"color": a.color}, {"color": b.color})


def _ask_bar_height(scene: Scene, rng: Random) -> Question:
    color = _any(scene, rng).color
    return q.attribute(f"How tall is the {color} bar?", "number", "rows", color=color)


def _ask_bar_count(scene: Scene, rng: Random) -> Question:
    return q.count("How many bars are there?")


def _ask_bar_exists(scene: Scene, rng: Random) -> Question:
    present = [t.color for t in scene.things]
    absent = [c for c in COLORS if c not in present]
    color = rng.choice(absent if absent and rng.random() < 0.5 else present)
    return q.existence(f"Is there {q.a(color)} bar?", color=color)


def _ask_bar_beside(scene: Scene, rng: Random) -> Question | None:
    pairs = [(a, side) for _, a, side in q.beside(scene) if side in ("left of", "right of")]
    if not pairs:
        return None
    anchor, side = rng.choice(pairs)
    text = f"What color is the bar {side} the {anchor.color} bar?"
    return q.relation(text, "color", "color", side, color=anchor.color)


def _ask_missing_bar(scene: Scene, rng: Random) -> Question | None:
    colors = [c for c in COLORS if not q.matching(scene, color=c)]
    if not colors:
        return None
    color = rng.choice(colors)
    return q.absence(f"How tall is the {color} bar?", "number", "rows", color=color)


def _ask_no_bar_beside(scene: Scene, rng: Random) -> Question | None:
    side = rng.choice(("left of", "right of"))
    color = (min if side == "left of" else max)(scene.things, key=lambda t: t.col).color
    asked = q.relation(f"What color is the bar {side} the {color} bar?", "color", "color", side, color=color)
    return q.no_neighbor(asked, side, color=color)


def _bar_phrase(thing: Thing) -> str:
    return f"{q.a(thing.color)} bar"


def _edit_bar(scene: Scene, thing: Thing) -> list[Thing]:
    free = [c for c in COLORS if not q.matching(scene, color=c)]
    heights = range(1, min(scene.rows, 6) + 1)
    return [replace(thing, color=c) for c in free] + [replace(thing, row=scene.rows - h, rows=h) for h in heights if h != thing.rows]


# ---- textures ---------------------------------------------------------------------------------------

_ADJECTIVE = {"stripes": "striped", "dots": "dotted", "checks": "checked"}


def _build_textures(rng: Random, rows: int, cols: int, level: int) -> list[Thing]:
    def make() -> tuple[str, str, str]:
        kind = rng.choice(("stripes", *PATTERNS))
        return kind, rng.choice(COLORS), rng.choice(ORIENTATIONS) if kind == "stripes" else ""

    return _scatter(rng, rows, cols, rng.randint(1, level), make, big=0.6)


def _texture_phrase(thing: Thing) -> str:
    return f"{thing.facing} {thing.color} {thing.kind}".strip()


def _ask_texture_color(scene: Scene, rng: Random) -> Question:
    kind = _any(scene, rng).kind
    return q.attribute(f"What color are the {kind}?", "color", "color", kind=kind)


def _ask_pattern(scene: Scene, rng: Random) -> Question:
    color = _any(scene, rng).color
    return q.attribute(f"What pattern is {color}?", "pattern", "kind", color=color)


def _ask_orientation(scene: Scene, rng: Random) -> Question | None:
    if not (striped := q.matching(scene, kind="stripes")):
        return None
    if len(striped) == 1:
        return q.attribute("Which way do the stripes run?", "orientation", "facing", kind="stripes")
    color = rng.choice(striped).color
    text = f"Which way do the {color} stripes run?"
    return q.attribute(text, "orientation", "facing", kind="stripes", color=color)


def _ask_texture_exists(scene: Scene, rng: Random) -> Question:
    t = _any(scene, rng)
    kind, color = t.kind, t.color
    if rng.random() < 0.5:
        absent = [(k, c) for k in PATTERNS for c in COLORS if not q.matching(scene, kind=k, color=c)]
        near = [(k, c) for k, c in absent if (k == kind) != (c == color)]
        kind, color = rng.choice(near or absent)
    return q.existence(f"Are there {color} {kind}?", kind=kind, color=color)


def _ask_texture_count(scene: Scene, rng: Random) -> Question:
    if rng.random() < 0.4:
        return q.count("How many patches are there?")
    kind = rng.choice(PATTERNS)
    return q.count(f"How many {_ADJECTIVE[kind]} patches are there?", kind=kind)


def _ask_texture_beside(scene: Scene, rng: Random) -> Question | None:
    if not (pairs := q.beside(scene)):
        return None
    _, anchor, side = rng.choice(pairs)
    name, wanted = f"the {anchor.color} {anchor.kind}", {"color": anchor.color, "kind": anchor.kind}
    if rng.random() < 0.5:
        return q.relation(f"What pattern is {side} {name}?", "pattern", "kind", side, **wanted)
    return q.relation(f"What color is the patch {side} {name}?", "color", "color", side, **wanted)


def _ask_bigger_texture(scene: Scene, rng: Random) -> Question | None:
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    if a.color == b.color:
        return None
    text = f"Is the {a.color} patch bigger than the {b.color} patch?"
    return q.bigger(text, {"color": a.color}, {"color": b.color})


def _ask_missing_texture(scene: Scene, rng: Random) -> Question | None:
    return _missing(scene, rng, PATTERNS, "What color are the {}?", "What pattern is {}?", "pattern")


def _edit_texture(scene: Scene, thing: Thing) -> list[Thing]:
    turned = [replace(thing, facing=facing) for facing in ORIENTATIONS] if thing.kind == "stripes" else []
    swapped = [replace(thing, kind=k) for k in ("dots", "checks")] if thing.kind != "stripes" else []
    return _recolored(thing) + turned + swapped + _resized(scene, thing)


# ---- routes -----------------------------------------------------------------------------------------


def _build_routes(rng: Random, rows: int, cols: int, level: int) -> list[Thing]:
    if rng.random() < 0.5:
        colors = iter(rng.sample(COLORS, len(COLORS)))
        n = rng.randint(1, level)
        return _scatter(rng, rows, cols, n, lambda: ("arrow", next(colors), rng.choice(DIRECTIONS)), big=0.25)
    turns = rng.randint(0, min(2, level - 1))
    for _ in range(60):
        cells = _walk(rng, rows, cols, turns)
        if cells:
            break
    else:
        cells = [(0, c) for c in range(cols)]
    if rng.random() < 0.5:
        cells = cells[::-1]
    colors, kinds = rng.sample(COLORS, 3), rng.sample(SHAPES, 2)
    ends = [Thing(kind, color, *cell) for kind, color, cell in zip(kinds, colors, (cells[0], cells[-1]))]
    return [_path(colors[2], tuple(cells[1:-1])), *ends]


def _path(color: str, cells: tuple[Cell, ...]) -> Thing:
    top, left = min(r for r, _ in cells), min(c for _, c in cells)
    bottom, right = max(r for r, _ in cells), max(c for _, c in cells)
    (r0, c0), (r1, c1) = cells[-2], cells[-1]
    facing = {(0, 1): "right", (0, -1): "left", (1, 0): "down", (-1, 0): "up"}[r1 - r0, c1 - c0]
    return Thing("path", color, top, left, bottom - top + 1, right - left + 1, facing, cells)


def _walk(rng: Random, rows: int, cols: int, turns: int) -> list[Cell] | None:
    """A path of `turns` turns that does not touch itself, its first and last leg at least 3 cells; None if it fails."""
    row, col = rng.randrange(rows), rng.randrange(cols)
    across = rng.random() < 0.5
    cells = [(row, col)]
    for leg in range(turns + 1):
        length = rng.randint(2, 4) if leg in (0, turns) else rng.randint(1, 3)
        if turns == 0:
            length = rng.randint(3, 5)
        step = rng.choice((1, -1))
        for _ in range(length):
            row, col = (row, col + step) if across else (row + step, col)
            cells.append((row, col))
        across = not across
    inside = all(0 <= r < rows and 0 <= c < cols for r, c in cells)
    apart = all(abs(a[0] - b[0]) + abs(a[1] - b[1]) > 1 for i, a in enumerate(cells) for b in cells[i + 2 :])
    return cells if inside and apart else None


def _ask_arrow(scene: Scene, rng: Random) -> Question | None:
    if not (arrows := q.matching(scene, kind="arrow")):
        return None
    if len(arrows) == 1 and rng.random() < 0.5:
        return q.attribute("Which way does the arrow point?", "direction", "facing", kind="arrow")
    color = rng.choice(arrows).color
    text = f"Which way does the {color} arrow point?"
    return q.attribute(text, "direction", "facing", kind="arrow", color=color)


def _ask_path_color(scene: Scene, rng: Random) -> Question:
    return q.attribute("What color is the path?", "color", "color", kind="path")


def _ask_path_direction(scene: Scene, rng: Random) -> Question:
    return q.attribute("Which way does the path point?", "direction", "facing", kind="path")


def _ask_path_end(scene: Scene, rng: Random) -> Question:
    end = rng.random() < 0.6
    field, noun = rng.choice((("kind", "shape"), ("color", "color")))

    def solve(scene: Scene) -> q.Finding | None:
        if not (path := q.only(scene, kind="path")):
            return None
        cells = path.path if end else path.path[::-1]
        (r0, c0), (r1, c1) = cells[-2], cells[-1]
        found = [t for t in scene.things if (2 * r1 - r0, 2 * c1 - c0) in t.cells]
        return (getattr(found[0], field), (found[0], path)) if found else None

    what = "What shape is" if field == "kind" else "What color is the shape"
    return Question(f"{what} at the {'end' if end else 'start'} of the path?", "relation", noun, solve)


def _ask_end_shape(scene: Scene, rng: Random) -> Question | None:
    if not (ends := [t for t in scene.things if t.kind in SHAPES]):
        return None
    t = rng.choice(ends)
    if rng.random() < 0.5:
        return q.attribute(f"What color is the {t.kind}?", "color", "color", kind=t.kind)
    return q.attribute(f"What shape is {t.color}?", "shape", "kind", color=t.color)


def _ask_turns(scene: Scene, rng: Random) -> Question:
    return q.attribute("How many turns does the path take?", "number", "turns", category="count", kind="path")


def _ask_arrow_count(scene: Scene, rng: Random) -> Question | None:
    return q.count("How many arrows are there?", kind="arrow") if q.matching(scene, kind="arrow") else None


def _ask_arrow_exists(scene: Scene, rng: Random) -> Question | None:
    if not (arrows := q.matching(scene, kind="arrow")):
        return None
    present = [t.color for t in arrows]
    color = rng.choice(present if rng.random() < 0.5 else [c for c in COLORS if c not in present] or present)
    return q.existence(f"Is there {q.a(color)} arrow?", kind="arrow", color=color)


def _ask_missing_arrow(scene: Scene, rng: Random) -> Question | None:
    colors = [c for c in COLORS if not q.matching(scene, kind="arrow", color=c)]
    if not q.matching(scene, kind="arrow") or not colors:
        return None
    color = rng.choice(colors)
    return q.absence(f"Which way does the {color} arrow point?", "direction", "facing", kind="arrow", color=color)


def _route_phrase(thing: Thing) -> str:
    return f"{q.a(thing.color)} {thing.kind}"


def _edit_route(scene: Scene, thing: Thing) -> list[Thing]:
    if thing.kind == "path":
        return _recolored(thing) + [_path(thing.color, thing.path[::-1])]
    free = [c for c in COLORS if not q.matching(scene, color=c)]
    recolored = [replace(thing, color=c) for c in free]
    if thing.kind == "arrow":
        return recolored + [replace(thing, facing=facing) for facing in DIRECTIONS]
    return recolored + [replace(thing, kind=k) for k in SHAPES if not q.matching(scene, kind=k)]


# ---- the table --------------------------------------------------------------------------------------


def _caption(phrase: Callable[[Thing], str]) -> tuple[Ask, ...]:
    return (lambda scene, rng: q.caption(phrase),)


DOMAINS: dict[str, Domain] = {
    "shapes": Domain(
        _build_shapes,
        {
            "attribute": (_ask_shape_color, _ask_sized_shape_color, _ask_shape, _ask_shape_size),
            "existence": (_ask_shape_exists, _ask_kind_exists),
            "count": (_ask_shape_count, _ask_color_count, _ask_all_count),
            "relation": (_ask_shape_beside,),
            "comparison": (_ask_bigger_shape,),
            "environment": (_background,),
            "caption": _caption(_shape_phrase),
            "absence": (_ask_missing_shape, _ask_no_shape_beside),
        },
        _edit_shape,
    ),
    "glyphs": Domain(
        _build_glyphs,
        {
            "ocr": (_ask_glyph_in_line, _ask_colored_glyph, _ask_sized_glyph, _ask_text),
            "attribute": (_ask_glyph_color, _ask_glyph_size),
            "existence": (_ask_glyph_exists,),
            "count": (_ask_glyph_count,),
            "relation": (_ask_glyph_beside,),
            "comparison": (_ask_greater_digit,),
            "environment": (_background,),
            "caption": _caption(_glyph_phrase),
            "absence": (_ask_missing_glyph,),
        },
        _edit_glyph,
    ),
    "charts": Domain(
        _build_charts,
        {
            "comparison": (_ask_extreme_bar, _ask_taller_bar),
            "attribute": (_ask_bar_height,),
            "count": (_ask_bar_count,),
            "existence": (_ask_bar_exists,),
            "relation": (_ask_bar_beside,),
            "environment": (_background,),
            "caption": _caption(_bar_phrase),
            "absence": (_ask_missing_bar, _ask_no_bar_beside),
        },
        _edit_bar,
    ),
    "textures": Domain(
        _build_textures,
        {
            "attribute": (_ask_texture_color, _ask_pattern, _ask_orientation),
            "existence": (_ask_texture_exists,),
            "count": (_ask_texture_count,),
            "relation": (_ask_texture_beside,),
            "comparison": (_ask_bigger_texture,),
            "environment": (_background,),
            "caption": _caption(_texture_phrase),
            "absence": (_ask_missing_texture,),
        },
        _edit_texture,
    ),
    "routes": Domain(
        _build_routes,
        {
            "attribute": (_ask_arrow, _ask_path_color, _ask_path_direction),
            "relation": (_ask_path_end,),
            "count": (_ask_turns, _ask_arrow_count),
            "existence": (_ask_arrow_exists,),
            "environment": (_background,),
            "caption": _caption(_route_phrase),
            "absence": (_ask_missing_arrow,),
        },
        _edit_route,
        hops=(_ask_end_shape,),
    ),
}
