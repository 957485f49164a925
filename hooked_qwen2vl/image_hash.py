"""A hash of images, for stored image embeddings, resumed runs, and clusters of questions about one image."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def image_hash(image: Any, wherever: bool = False) -> str:
    """32 hexadecimal digits that identify an image.

    A file is identified by its path; a PIL image by its pixels, mode and size; an array or tensor by its values, dtype and shape.

    Args:
        wherever: identify a file by its name and size in bytes instead, so that a copy of the folder has the same images.
    """
    hashed = hashlib.blake2b(digest_size=16)
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        length = _length(path) if wherever else None
        hashed.update((f"file {path.name} {length}" if wherever else f"file {path}").encode(errors="surrogatepass"))
    elif isinstance(image, Image.Image):
        hashed.update(f"picture {image.mode} {image.size} {image.getpalette()} {image.info.get('transparency')}".encode())
        hashed.update(image.tobytes())
    elif (torch := sys.modules.get("torch")) and isinstance(image, torch.Tensor):  # not imported for the data alone
        hashed.update(f"tensor {image.dtype} {tuple(image.shape)}".encode())
        hashed.update(image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] (an array is a buffer)
    else:
        array = np.asarray(image)
        if array.dtype == object:
            raise ValueError(f"expected an image (a path, picture, array or tensor), got {type(image).__name__}.")
        hashed.update(f"array {array.dtype} {array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()
