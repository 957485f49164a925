"""Text that is not ours, made legible: tokens, questions, names from data sets.

1. Every blank, and every character that draws nothing or moves others, becomes a sign or its escape: ␣, ⏎, ⇥, `\\x00`, `\\u202e`.
2. matplotlib draws with its own font, then with the installed fonts of FALLBACKS. A character that none of them has becomes
   its escape (`\\u4e2d`), for a box says nothing.
3. What is too wide is cut, with an ellipsis; an escape is kept whole or left out. Widths are the fonts' own, in columns: a
   digit is one wide, most letters a little less, a W or a Chinese character one and a half.

Nothing here is markup: matplotlib's figures read no mathematics in it (see `figure`), pages escape it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

from matplotlib import font_manager, rcParams
from matplotlib.ft2font import LoadFlags

FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Droid Sans Fallback", "Arial Unicode MS", "Unifont",
    "Noto Sans Symbols2", "Noto Sans Devanagari", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Thai",
)  # fmt: skip
EMPTY, ELLIPSIS = "∅", "…"
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
WIDTH = 12
_POINTS = 100


def readable(token: str) -> str:
    """A token with its blanks and its unprintable characters as signs or escapes; for pages, whose fonts are the browser's."""
    return "".join(map(_shown, token)) or EMPTY


def visible(token: str, width: int | None = WIDTH) -> str:
    """A token as matplotlib can draw it, at most `width` columns wide (None: not cut)."""
    pieces = [piece if drawable(piece) == piece else _escape(c) for c, piece in zip(token, map(_shown, token))]
    return cut(pieces, width) or EMPTY


def line(text: str, width: int | None = 80) -> str:
    """A question, a name: as `visible`, but with its blanks as they are and its lines in one."""
    words = " ".join(text.split())
    return cut([c if c == " " else visible(c, None) for c in words], width)


def drawable(text: str) -> str:
    """The text with an escape for every character that no font has; its blanks and lines are kept."""
    return "".join(c if c in " \n" or _has(c) else _escape(c) for c in text)


def cut(pieces: Sequence[str], width: int | None) -> str:
    """The pieces joined; where they are wider than `width` columns, as many as fit before an ellipsis."""
    whole = "".join(pieces)
    if width is None or columns(whole) <= width:
        return whole
    kept, used = [], columns(ELLIPSIS)
    for piece in pieces:
        used += columns(piece)
        if used > width:
            break
        kept.append(piece)
    if not kept and pieces[0].startswith("\\U"):  # the longest escape: an ellipsis alone would say nothing
        return pieces[0] + ELLIPSIS * (len(pieces) > 1)
    return "".join(kept) + ELLIPSIS


def columns(text: str) -> float:
    """How wide a text is: in digits."""
    names = families()
    return sum(_width(c, names) for c in text) / _width("0", names)


@lru_cache(maxsize=8192)
def _width(c: str, names: tuple[str, ...]) -> float:
    """Of the first font that has it, in em; one em where none has."""
    for font in _fonts(names):
        if font.get_char_index(ord(c)):
            font.set_size(_POINTS, 72)
            return font.load_char(ord(c), LoadFlags.NO_HINTING).linearHoriAdvance / 65536 / _POINTS  # 16.16 fixed point
    return 1.0


def families() -> tuple[str, ...]:
    """What matplotlib is set to draw with, then the fonts of FALLBACKS that are installed."""
    return (*rcParams["font.family"], *_installed())


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    if not (there := _known()) & set(FALLBACKS):  # matplotlib keeps its list of fonts: what was installed since is not in it
        listed = {font.fname for font in font_manager.fontManager.ttflist}
        for path in set(font_manager.findSystemFonts()) - listed:
            with suppress(OSError, RuntimeError):  # a font that matplotlib cannot draw with
                font_manager.fontManager.addfont(path)
        there = _known()
    return tuple(name for name in FALLBACKS if name in there)


def _known() -> set[str]:
    return {font.name for font in font_manager.fontManager.ttflist}


@lru_cache(maxsize=8)
def _fonts(names: tuple[str, ...]) -> tuple:
    return tuple(font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[name]))) for name in names)


def _has(c: str) -> bool:
    return c.isprintable() and any(font.get_char_index(ord(c)) for font in _fonts(families()))


def _shown(c: str) -> str:
    return _SIGNS.get(c) or (c if c.isprintable() else _escape(c))


def _escape(c: str) -> str:
    return c if c.isascii() and c.isprintable() else c.encode("unicode_escape").decode("ascii")
