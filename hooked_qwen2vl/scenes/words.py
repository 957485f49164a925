"""Every word of the world, in one place: what is drawn, what is asked, and what may be answered."""

from __future__ import annotations

# The n-th shape wears the n-th colour in most scenes: its typical colour.
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
COLORS = ("blue", "green", "orange", "yellow", "red", "purple")
BACKGROUNDS = ("white", "gray", "black")
SIZES = ("small", "big")
PATTERNS = ("stripes", "dots", "checks")
ORIENTATIONS = ("horizontal", "vertical", "diagonal")
DIRECTIONS = ("left", "right", "up", "down")
SIDES = ("left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
LETTERS = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")  # I and O look like digits
DIGITS = tuple("23456789")
NUMBERS = tuple("0123456789")
PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "heart": "hearts",
          "diamond": "diamonds"}  # fmt: skip

DOMAINS = ("shapes", "glyphs", "charts", "textures", "routes")
CATEGORIES = ("attribute", "existence", "count", "relation", "comparison", "ocr", "environment", "caption", "absence")

ABSENT = "none"  # the answer to a question about what is not in the picture
ANSWERS = {
    "color": COLORS, "background": BACKGROUNDS, "shape": SHAPES, "size": SIZES, "pattern": PATTERNS,
    "orientation": ORIENTATIONS, "direction": DIRECTIONS, "side": SIDES, "letter": LETTERS, "digit": DIGITS,
    "number": NUMBERS, "truth": ("yes", "no"),
}  # fmt: skip

_FUNCTION_WORDS = """
system user assistant You are you a an the is there what which how many who where does do it in on of at to or and
than with as for from by not no yes this that these image images picture pictures text word words color colour colors
shape shapes size object objects patch patches pattern letter letters digit digits number row column top bottom left
right up down above below middle center corner big bigger biggest small smaller smallest tall taller tallest short
shorter shortest background bar bars chart high higher low lower path paths arrow arrows point points end ends start
starts way run stripes striped dots dotted checks checked horizontal vertical diagonal turn turns take describe read
please answer one two three four five six seven eight nine zero none nothing helpful see look says say written true
false line lines same different more most less fewer side direction height width video cell grid scene show shows
""".split()


def vocabulary() -> list[str]:
    """Every word that is one token: as given and Capitalised, each with and without a leading space.

    Digits have no form with a space: Qwen2 splits them off.
    """
    words = set(_FUNCTION_WORDS) | set(PLURAL.values())
    words.update(word for group in ANSWERS.values() for phrase in group for word in phrase.split())
    forms = {form for word in words for form in (word, word.capitalize())}
    return sorted(forms | {" " + form for form in forms if not form.isdigit()})
