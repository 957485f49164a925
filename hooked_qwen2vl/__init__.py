"""Qwen2-VL (and Qwen2.5-VL, Qwen3-VL) for TransformerLens users: hooks, cache, lens and patching on images.

Axis names used throughout: `batch pos key_pos head kv_head d_model d_head d_mlp d_vocab layer` in the text decoder;
`image patch image_token rows cols d_vision` in the vision tower, where a patch is 14×14 pixels (16×16 in Qwen3-VL) and
an image token 2×2 patches. `thw` is always (t, h, w). Boxes are (x0, y0, x1, y1), origin top left, in original pixels.

Public names are imported when first used, so that --help does not wait for torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .moved import MovedModules
from .version import __version__

sys.meta_path.append(MovedModules())

if TYPE_CHECKING:
    from .cache import HookedCache, cache_image
    from .config import HookedQwen2VLConfig
    from .geometry import Box
    from .inputs import Inputs
    from .model import HookedQwen2VL
    from .processor import Processor, open_image

_HOMES = {
    "HookedCache": "cache",
    "HookedQwen2VL": "model",
    "HookedQwen2VLConfig": "config",
    "Inputs": "inputs",
    "Processor": "processor",
    "Box": "geometry",
    "open_image": "processor",
    "cache_image": "cache",
}
__all__ = [
    "Box", "HookedCache", "HookedQwen2VL", "HookedQwen2VLConfig", "Inputs", "Processor", "__version__", "cache_image", "open_image",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
