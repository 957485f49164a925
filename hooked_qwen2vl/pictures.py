"""Opens images from PIL images, paths, arrays, data URIs and base64 text, and applies Qwen's keys for their size.

As in transformers, the EXIF orientation of a file is applied, and a PIL image is used as it is. The keys `min_pixels`, `max_pixels`,
`resized_height` and `resized_width` of a message resize an image before the processor does, as in `qwen_vl_utils.fetch_image`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .files import open_regular

ImageLike = Image.Image | str | Path | np.ndarray | Tensor
VideoLike = Sequence[ImageLike] | np.ndarray | Tensor
MAX_ASPECT_RATIO = 200  # the reference refuses more
MAX_ENCODED = 64 * 2**20  # characters of a data URI or of base64 text
SHOWN = 200  # characters of a value in error messages, at most
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_LOSSY = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F", "LAB")  # modes whose values PIL's convert("RGB") clips or wraps
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def short(value: Any) -> str:
    """A value for error messages, in at most 200 characters."""
    text = repr(value[:SHOWN] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 10]}…"


@dataclass(frozen=True)
class Element:
    """An image or a video of a message with further keys.

    Attributes:
        content: the image, or the video's frames.
        settings: SIZE_KEYS, and for a video `fps`.
    """

    content: Any
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.content)

    def resized(self, picture: Image.Image, side: int) -> Image.Image:
        """The picture, resized as `qwen_vl_utils` does before the processor.

        Args:
            side: side of an image token, in pixels.
        """
        settings = self.settings
        if not set(SIZE_KEYS) & set(settings):
            return picture
        if "resized_height" in settings:
            height, width = smart_resize(settings["resized_height"], settings["resized_width"], side, 4 * side**2, 16384 * side**2)
        else:
            low, high = settings.get("min_pixels", 4 * side**2), settings.get("max_pixels", 16384 * side**2)
            height, width = smart_resize(picture.height, picture.width, side, low, high)
        if picture.mode == "RGBA":  # on white, as qwen_vl_utils
            white = Image.new("RGB", picture.size, (255, 255, 255))
            white.paste(picture, mask=picture.split()[3])
            picture = white
        return picture.convert("RGB").resize((width, height))


def element(kind: str, content: Any, settings: Mapping[str, Any]) -> Any:
    """The content, as an `Element` if its message has further keys.

    Raises:
        ValueError: a key that is not a number, or only one of resized_height and resized_width.
    """
    if not settings:
        return content
    wrong = [key for key in SIZE_KEYS if key in settings and not _is_count(settings[key])]
    if wrong:
        raise ValueError(f"{wrong[0]} of the {kind} is {short(settings[wrong[0]])}: expected a whole number of pixels above 0.")
    rate: Any = settings.get("fps", 1)
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < cast(Any, rate) < float("inf"):
        raise ValueError(f"fps of the {kind} is {short(rate)}: expected how many of the frames there are a second, a number above 0.")
    if ("resized_height" in settings) != ("resized_width" in settings):
        raise ValueError(f"the {kind} has only one of resized_height and resized_width: pass both.")
    if settings.get("min_pixels", 0) > settings.get("max_pixels", float("inf")):
        raise ValueError(f"the {kind} has min_pixels = {settings['min_pixels']}, more than max_pixels = {settings['max_pixels']}.")
    frames = list(content) if kind == "video" and not hasattr(content, "shape") and hasattr(content, "__iter__") else content
    return Element(content if isinstance(content, str) else frames, dict(settings))


def open_image(image: ImageLike) -> Image.Image:
    """Opens an image: a PIL image, a path, a data URI or base64 text, or an array or tensor [h w 3] or [3 h w] of bytes.

    As in transformers, the EXIF orientation of a file is applied, and a PIL image is used as it is (if it has transparency, the image
    processor puts it on white).

    Raises:
        ValueError: a missing or damaged file, no pixels, an extreme aspect ratio, more than 8 bits per channel, a text that is too
            long, or another type.
    """
    if isinstance(image, (str, Path)):
        picture = _open_file(image)
    elif isinstance(image, (np.ndarray, Tensor)):
        picture = _from_array(image)
    elif isinstance(image, Image.Image):
        picture = image
        if picture.mode in _LOSSY:
            raise ValueError(_lossy(picture.mode))
    else:
        raise ValueError(f"expected an image (PIL, path, or array [h, w, 3] of bytes), got {type(image).__name__}.")
    width, height = picture.size
    if not width or not height:
        raise ValueError(f"an image has no pixels: its size is {width}×{height}.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"an image of {width}×{height} pixels is too long and thin: Qwen2-VL takes sides up to {MAX_ASPECT_RATIO} to 1; crop or pad it."
        )
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"an image could not be decoded ({str(error)[:SHOWN]}): the file is cut short or damaged.") from error
    return picture


def _lossy(mode: str) -> str:
    return (
        f"an image of mode {mode!r} would lose its content as 8-bit RGB: scale its numbers to 0..255 yourself, for instance "
        f"Image.fromarray((255 * (a - a.min()) / (a.max() - a.min())).astype('uint8')).convert('RGB') of a = numpy.asarray(image)"
        + (", or use PIL.ImageCms for LAB." if mode == "LAB" else ".")
    )


def _open_file(path: str | Path) -> Image.Image:
    name = str(path)[:SHOWN]
    if str(path).startswith(("http://", "https://")):
        raise ValueError(f"{name} is a web address: download the image and pass its path.")
    encoded = _encoded(path) if isinstance(path, str) else None
    if encoded is not None:
        name = f"the encoded image {name[:40]}…"
    try:
        with _source(path, encoded) as file, Image.open(file) as picture:
            if picture.mode in _LOSSY:
                raise ValueError(_lossy(picture.mode))
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"there is no image at {name}: check the path.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to open safely ({error}): make it smaller.") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything: KeyError, struct.error, ZeroDivisionError, …
        why = getattr(error, "strerror", None) or re.sub(" <_io[^>]*>", "", str(error).replace(str(path), "it"))  # a handle's text varies
        raise ValueError(f"{name} is not a readable image ({why[:400]}): it is damaged or of another kind.") from error


def _source(path: str | Path, encoded: bytes | None) -> IO[bytes]:
    return open_regular(str(path).removeprefix("file://")) if encoded is None else io.BytesIO(encoded)


def _encoded(text: str) -> bytes | None:
    """The bytes of a data URI or of base64 text; None for other texts, which are paths.

    Raises:
        ValueError: a data URI that is not an image or not base64, or a text that is too long.
    """
    if len(text) > MAX_ENCODED:
        raise ValueError(f"an encoded image of {len(text)} characters is longer than {MAX_ENCODED}: save it to a file and pass its path.")
    body = text
    if text.startswith("data:"):
        head, found, body = text.partition("base64,")
        if not found or not head.startswith("data:image"):
            raise ValueError(f"{short(text[:60])} is not an image as a data URI: expected 'data:image/png;base64,…'.")
    elif os.path.exists(text) or not _BASE64.fullmatch(text):
        return None
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        if body is text:
            return None
        raise ValueError(f"the data URI {short(text[:60])} is not base64 ({error}): it is cut short or damaged.") from error


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    """An image from bytes [h w 3], or [3 h w] if the last axis does not have length 3."""
    bytes_ = torch.uint8 if isinstance(array, Tensor) else np.uint8
    shape = tuple(array.shape)
    if len(shape) != 3 or 3 not in (shape[0], shape[-1]) or array.dtype != bytes_:
        raise ValueError(f"expected an image array [h, w, 3] of uint8 in 0..255, got shape {shape} of {array.dtype}.")
    array = array.cpu().numpy() if isinstance(array, Tensor) else array
    array = array if shape[-1] == 3 else array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array)) if array.size else Image.new("RGB", array.shape[1::-1])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
