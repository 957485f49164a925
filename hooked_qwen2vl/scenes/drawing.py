"""A scene as pixels: background with noise, and one cached, supersampled sprite for each kind of thing."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from .folder import CELL
from .scene import Cell, Scene, Thing
from .words import DIGITS, LETTERS, PATTERNS

RGB = {
    "blue": (40, 90, 220), "green": (30, 150, 60), "orange": (245, 130, 20), "yellow": (250, 215, 30),
    "red": (215, 35, 40), "purple": (145, 50, 180), "white": (242, 242, 242), "gray": (150, 150, 150),
    "black": (28, 28, 28),
}  # fmt: skip
_SUPERSAMPLING = 4
_NOISE_SIDE = 512
_FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold")  # of glyphs
_ANGLES = {"right": 0, "down": 90, "left": 180, "up": 270}
_STEPS = {(0, 1): "right", (1, 0): "down", (0, -1): "left", (-1, 0): "up"}


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of (28·cols, 28·rows) pixels."""
    return Image.fromarray(draw(scene))


def draw(scene: Scene) -> UInt8[np.ndarray, "height width 3"]:
    """The scene as an array."""
    height, width = scene.rows * CELL, scene.cols * CELL
    shade, noise = _noise(scene.noise, height, width)
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = np.array(RGB[scene.background], dtype=np.float32) + shade
    for thing in scene.things:
        sprite, alpha = _sprite(thing.kind, thing.color, thing.rows, thing.cols, thing.facing, _local(thing), _font(scene, thing))
        x0, y0, x1, y1 = thing.box
        patch = canvas[y0:y1, x0:x1]
        patch += alpha * (sprite - patch)
    canvas += noise
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _font(scene: Scene, thing: Thing) -> str:
    """A glyph's font: by chance, the same whenever the scene is drawn; "" for other things."""
    if thing.kind not in LETTERS and thing.kind not in DIGITS:
        return ""
    return _FONTS[crc32(f"{scene.noise} {thing.row} {thing.col}".encode()) % len(_FONTS)]


def _local(thing: Thing) -> tuple[Cell, ...]:
    return tuple((row - thing.row, col - thing.col) for row, col in thing.path)


@cache
def _noise_field() -> np.ndarray:
    return np.random.default_rng(20240919).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3)).astype(np.float32)


def _noise(seed: int, height: int, width: int) -> tuple[float, np.ndarray]:
    """(a shift of the background's brightness, a window of one field of white noise at a strength of 1 to 8)."""
    row, col = seed % (_NOISE_SIDE - height), (seed // 601) % (_NOISE_SIDE - width)
    strength, shade = 1 + (seed // 7) % 8, (seed // 13) % 17 - 8
    return float(shade), strength * _noise_field()[row : row + height, col : col + width]


@lru_cache(maxsize=8192)
def _sprite(kind: str, color: str, rows: int, cols: int, facing: str, path: tuple[Cell, ...], font: str) -> tuple[np.ndarray, np.ndarray]:
    """(colour [3], coverage [height width 1] in 0..1) of one thing, in its own box."""
    scale = CELL * _SUPERSAMPLING
    image = Image.new("L", (cols * scale, rows * scale))
    pen = ImageDraw.Draw(image)
    if kind == "bar":
        pen.rectangle((0.14 * scale, 0, 0.86 * scale, rows * scale), fill=255)
    elif kind == "path":
        _draw_path(pen, path, scale)
    elif kind == "arrow":
        _draw_polygon(pen, _rotated(_ARROW, _ANGLES[facing]), rows * scale, 0, 0)
    elif kind in PATTERNS:
        _draw_pattern(pen, kind, facing, rows * scale, scale)
    elif font:
        _draw_glyph(pen, kind, rows * scale, font)
    else:
        _draw_shape(pen, kind, rows * scale)
    image = image.resize((cols * CELL, rows * CELL), Image.Resampling.BOX)
    alpha = np.asarray(image, dtype=np.float32)[..., None] / 255
    return np.array(RGB[color], dtype=np.float32), alpha


# Outlines in the unit square, x to the right and y down.
_ARROW = [(0.1, 0.38), (0.5, 0.38), (0.5, 0.12), (0.92, 0.5), (0.5, 0.88), (0.5, 0.62), (0.1, 0.62)]
_HEAD = [(0.3, 0.1), (0.95, 0.5), (0.3, 0.9)]
_STAR = [(0.5 + r * math.sin(math.pi * k / 5), 0.53 - r * math.cos(math.pi * k / 5)) for k, r in enumerate([0.47, 0.19] * 5)]
_HEART = [
    (0.5 + 0.42 * math.sin(t) ** 3, 0.47 - 0.026 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
     - math.cos(4 * t)))
    for t in np.linspace(0, 2 * math.pi, 60)
]  # fmt: skip
_OUTLINES = {
    "square": [(0.14, 0.14), (0.86, 0.14), (0.86, 0.86), (0.14, 0.86)],
    "triangle": [(0.5, 0.1), (0.92, 0.86), (0.08, 0.86)],
    "diamond": [(0.5, 0.05), (0.85, 0.5), (0.5, 0.95), (0.15, 0.5)],
    "star": _STAR,
    "heart": _HEART,
}


def _draw_polygon(pen: ImageDraw.ImageDraw, points, scale: float, x: float, y: float) -> None:
    pen.polygon([(x + px * scale, y + py * scale) for px, py in points], fill=255)


def _rotated(points, degrees: float):
    a = math.radians(degrees)
    return [
        (0.5 + (x - 0.5) * math.cos(a) - (y - 0.5) * math.sin(a), 0.5 + (x - 0.5) * math.sin(a) + (y - 0.5) * math.cos(a))
        for x, y in points
    ]


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, side: int) -> None:
    if kind == "circle":
        pen.ellipse((0.1 * side, 0.1 * side, 0.9 * side, 0.9 * side), fill=255)
    else:
        _draw_polygon(pen, _OUTLINES[kind], side, 0, 0)


def _draw_glyph(pen: ImageDraw.ImageDraw, glyph: str, side: int, font: str) -> None:
    pen.text((side / 2, side / 2), glyph, fill=255, font=_read_font(font, round(0.88 * side)), anchor="mm")


@cache
def _read_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / f"fonts/ttf/{name}.ttf"), size)


def _draw_pattern(pen: ImageDraw.ImageDraw, kind: str, facing: str, side: int, scale: int) -> None:
    pitch = scale / 3.5  # 8 px
    low, high = 0.06 * scale, side - 0.06 * scale
    steps = range(int(side / pitch) + 1)
    if kind == "dots":
        for i in steps:
            for j in steps:
                x, y = (i + 0.5) * pitch, (j + 0.5) * pitch
                if x + pitch / 3 < side and y + pitch / 3 < side:
                    pen.ellipse((x - pitch / 3, y - pitch / 3, x + pitch / 3, y + pitch / 3), fill=255)
    elif kind == "checks":
        for i in steps:
            for j in steps:
                if (i + j) % 2 == 0:
                    pen.rectangle((i * pitch, j * pitch, (i + 1) * pitch - 1, (j + 1) * pitch - 1), fill=255)
    elif facing == "horizontal":
        for j in steps:
            pen.rectangle((low, (j + 0.25) * pitch, high, (j + 0.75) * pitch), fill=255)
    elif facing == "vertical":
        for i in steps:
            pen.rectangle(((i + 0.25) * pitch, low, (i + 0.75) * pitch, high), fill=255)
    else:
        for i in range(-len(steps), 2 * len(steps)):
            pen.line((i * pitch, 0, i * pitch - side, side), fill=255, width=round(pitch * 0.4))


def _draw_path(pen: ImageDraw.ImageDraw, path: tuple[Cell, ...], scale: int) -> None:
    centers = [((col + 0.5) * scale, (row + 0.5) * scale) for row, col in path]
    (r0, c0), (r1, c1) = path[0], path[1]
    start = (centers[0][0] - (c1 - c0) * 0.45 * scale, centers[0][1] - (r1 - r0) * 0.45 * scale)
    width = round(0.26 * scale)
    pen.line([start, *centers], fill=255, width=width, joint="curve")
    (r0, c0), (r1, c1) = path[-2], path[-1]
    head = _rotated(_HEAD, _ANGLES[_STEPS[r1 - r0, c1 - c0]])
    _draw_polygon(pen, head, scale, c1 * scale, r1 * scale)
