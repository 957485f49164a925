"""Makes tokens, questions and names from data sets legible in figures and pages.

1. Spaces, and characters that are invisible or move others, become signs or escapes: ␣, ⏎, ⇥, `\\x00`, `\\u202e`.
2. matplotlib draws with its own font, then with the installed fonts of FALLBACKS. A character that none of them has becomes its
   escape (`\\u4e2d`) instead of an empty box.
3. Texts that are too wide are cut, with an ellipsis; escapes are never cut in the middle. Widths are measured with the fonts, in
   columns: a digit is 1 wide, most letters a little less, a W or a Chinese character 1.5.

Texts are never read as markup: figures do not read mathematics (see `figure`), and pages escape HTML.
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
    """A token with spaces and unprintable characters as signs or escapes; for pages, where the browser has the fonts."""
    return "".join(map(_shown, token)) or EMPTY


def visible(token: str, width: int | None = WIDTH) -> str:
    """A token as matplotlib can draw it, at most `width` columns wide (None: not cut)."""
    pieces = [piece if drawable(piece) == piece else _escape(c) for c, piece in zip(token, map(_shown, token))]
    return cut(pieces, width) or EMPTY


def line(text: str, width: int | None = 80) -> str:
    """A question or name, as `visible`, but with its spaces kept and its lines joined."""
    words = " ".join(text.split())
    return cut([c if c == " " else visible(c, None) for c in words], width)


def drawable(text: str) -> str:
    """The text with an escape for every character that no font has; spaces and line breaks are kept."""
    return "".join(c if c in " \n" or _has(c) else _escape(c) for c in text)


def cut(pieces: Sequence[str], width: int | None) -> str:
    """The pieces joined; if they are wider than `width` columns, as many as fit, and an ellipsis."""
    whole = "".join(pieces)
    if width is None or columns(whole) <= width:
        return whole
    kept, used = [], columns(ELLIPSIS)
    for piece in pieces:
        used += columns(piece)
        if used > width:
            break
        kept.append(piece)
    if not kept and pieces[0].startswith("\\U"):  # an escape wider than `width` is better than an ellipsis alone
        return pieces[0] + ELLIPSIS * (len(pieces) > 1)
    return "".join(kept) + ELLIPSIS


def columns(text: str) -> float:
    """Width of a text in columns (1 is the width of a digit)."""
    names = families()
    return sum(_width(c, names) for c in text) / _width("0", names)


@lru_cache(maxsize=8192)
def _width(c: str, names: tuple[str, ...]) -> float:
    """Width of a character in em, in the first font that has it; 1 if no font has it."""
    for font in _fonts(names):
        if font.get_char_index(ord(c)):
            font.set_size(_POINTS, 72)
            return font.load_char(ord(c), LoadFlags.NO_HINTING).linearHoriAdvance / 65536 / _POINTS  # 16.16 fixed point
    return 1.0


def families() -> tuple[str, ...]:
    """matplotlib's configured font families, then the installed fonts of FALLBACKS."""
    return (*rcParams["font.family"], *_installed())


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    if not (there := _known()) & set(FALLBACKS):  # matplotlib's cached list lacks fonts installed since
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
