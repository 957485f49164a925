"""Qwen2-VL for TransformerLens users: hooks, cache, lens and patching on images.

Axis words used throughout: `batch pos key_pos head kv_head d_model d_head d_mlp d_vocab layer` in the text
decoder; `image patch image_token rows cols d_vision` in the vision tower, where a patch is 14×14 pixels and
an image token 2×2 patches. `thw` is always (t, h, w). Boxes are (x0, y0, x1, y1), origin top left, in
original pixels.
"""

from .cache import HookedCache, cache_image
from .config import HookedQwen2VLConfig
from .inputs import Inputs
from .model import HookedQwen2VL
from .processor import Processor
from .version import __version__

__all__ = ["HookedCache", "HookedQwen2VL", "HookedQwen2VLConfig", "Inputs", "Processor", "__version__", "cache_image"]
