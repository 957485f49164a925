"""The plan of a run over a data set: which questions form a batch, in which order, and an estimate of the memory.

1. The data are read in windows of about a thousand questions; only one line per question is kept.
2. In a window, questions of the same size (image grids, length bucket) form batches, in the order of the data.
3. A few batches form a shard, which is written, or run again, as a whole.

The plan depends only on the data and the settings, not on the process or on interruptions. So a batch always has the same
questions, and its floating-point results do not depend on which process computes it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from analyses.data.examples import problem_of
from hooked_qwen2vl.cache_size import in_words
from hooked_qwen2vl.files import open_regular
from hooked_qwen2vl.image_hash import image_hash
from hooked_qwen2vl.moved import renamed_attributes
from hooked_qwen2vl.prompt_text import text_ids
from hooked_qwen2vl.protocols import Model

if TYPE_CHECKING:
    from analyses.data.examples import Example

LENGTH_BUCKET = 8  # question tokens; rows of a batch are padded by fewer than this
TEMPLATE_TOKENS = 32  # upper bound on what the chat template adds, for the estimate of memory
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
PLACES = ("source", "mask")  # fields of a question that name a file
COLUMNS = ("item", "id", "part", "batch", "size", "digest", "domain", "category", "answer")
_FILLED = ("item", "part", "batch", "size", "digest", "id", "domain", "category", "answer")


@dataclass(frozen=True)
class Size:
    """Size of a question; questions of the same size share batches.

    Attributes:
        grids: (h, w) in patches of each image.
        text: tokens of the question, rounded up to a multiple of LENGTH_BUCKET.
        domain: the question's domain if batches must have one domain, else "".
    """

    grids: tuple[tuple[int, int], ...]
    text: int
    domain: str = ""

    def __str__(self) -> str:
        images = " and ".join(f"{h}×{w} patches" for h, w in self.grids) or "no image"
        return f"{images}, question up to {self.text} tokens{f', {self.domain}' if self.domain else ''}"


UNREADABLE = "image unreadable"
Sizer = Callable[["Example"], Any]


def size_by_model(model: Model, min_pixels: int | None = None, max_pixels: int | None = None, by_domain: bool = False) -> Sizer:
    """A function from a question to its size with this model's processor; it reads only the headers of images.

    Args:
        by_domain: whether a batch must have questions of one domain only.
        min_pixels, max_pixels: as for `model.to_inputs`; None: the processor's.
    Raises:
        ValueError: when called: a missing or unreadable image, or one whose aspect ratio the processor refuses.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    vision, settings = model.cfg.vision, model.processor.image_processor.size
    low, high = min_pixels or settings["shortest_edge"], max_pixels or settings["longest_edge"]

    def size(example: Example) -> Size:
        grids = []
        for width, height in map(image_size, example.images):
            resized = smart_resize(height, width, vision.patch_size * vision.spatial_merge_size, low, high)
            grids.append(tuple(edge // vision.patch_size for edge in resized))
        n_tokens = len(text_ids(model.tokenizer, example.question))
        bucket = math.ceil(n_tokens / LENGTH_BUCKET) * LENGTH_BUCKET
        return Size(tuple(grids), bucket, example.domain if by_domain else "")

    return size


def size_by_pixels(example: Example) -> Size:
    """The size of a question without a model: images in pixels instead of patches, and four characters per token."""
    sizes = tuple((height, width) for width, height in map(image_size, example.images))
    return Size(sizes, math.ceil(len(example.question) / 4 / LENGTH_BUCKET) * LENGTH_BUCKET)


def image_size(image: Any) -> tuple[int, int]:
    """(width, height) of an image after its EXIF rotation, without decoding the file.

    Raises:
        ValueError: no such file, or not an image.
    """
    try:
        if isinstance(image, (str, os.PathLike)):
            with open_regular(os.fspath(image)) as file:
                return _seen_size(Image.open(file))
        return _seen_size(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders can raise anything for a damaged header
        raise ValueError(f"{str(image)[:200]} is not a readable image ({getattr(error, 'strerror', None) or str(error)[:300]}).") from error


def _seen_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    swapped = Image.Image.getexif(image).get(0x0112) in ROTATED  # a PNG's own getexif would decode the file
    return (height, width) if swapped else (width, height)


def make_plan(stream: Iterable[Example], size: Sizer, batch_size: int, batches_per_shard: int, window: int) -> pd.DataFrame:
    """One row per question, in the order in which they will be run.

    Returns:
        columns item (index in the data), id, part (number of the shard), batch, size, digest (of the question), domain, category,
        answer.
    Raises:
        ValueError: no data, two questions with the same id, or a batch_size, batches_per_shard or window below 1.
    """
    for name, value in (("batch_size", batch_size), ("batches_per_shard", batches_per_shard), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    rows, n_batches, n_shards = [], 0, 0
    for questions in windows(stream, window):
        buckets: dict[str, list] = {}
        for item, example in questions:
            buckets.setdefault(_size_of(example, size), []).append((item, example))
        batches = [(key, batch) for key, bucket in buckets.items() for batch in _batched(bucket, batch_size)]
        for number, (key, batch) in enumerate(batches):
            shard = n_shards + number // batches_per_shard
            rows += [(i, shard, n_batches + number, key, digest(e), *_labels(e)) for i, e in batch]
        n_batches += len(batches)
        n_shards += math.ceil(len(batches) / batches_per_shard)  # a shard never spans two windows
    if not rows:
        raise ValueError("the data hold no question.")
    plan = pd.DataFrame(rows, columns=list(_FILLED))[list(COLUMNS)]
    twice = plan["id"][plan["id"].duplicated()]
    if len(twice):
        raise ValueError(f"the id {twice.iloc[0]!r} comes twice in the data: results are kept by id, make them unique.")
    return plan


def windows(stream: Iterable[Example], window: int) -> Iterator[Sequence[tuple[int, Example]]]:
    """The data as chunks of (item, question)."""
    return _batched(enumerate(stream), window)


def _batched(stream: Iterable, n: int) -> Iterator[list]:
    stream = iter(stream)
    while some := list(islice(stream, n)):
        yield some


def label(text: Any) -> str:
    """A text that UTF-8 can store: lone surrogates become escapes, and other objects their `ascii()`."""
    return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else ascii(text)[:200]


def _labels(example: Example) -> tuple[str, ...]:
    return tuple(label(value) for value in (example.id, example.domain, example.category, example.answer))


def _size_of(example: Example, size: Sizer) -> str:
    if problem_of(example):
        return UNREADABLE
    try:
        return str(size(example))
    except ValueError:
        return UNREADABLE  # the run records the reason


def digest(example: Example) -> str:
    """A hash of a question's fields and images; an image file counts by its name and its size in bytes.

    Folders do not count, so the same files in another place are the same data.
    """
    words = [(field.name, getattr(example, field.name)) for field in fields(example) if field.repr and field.name not in PLACES]
    hashed = hashlib.blake2b(repr(words).encode(), digest_size=12)
    for image in example.images if isinstance(example.images, (tuple, list)) else ():
        try:
            hashed.update(image_hash(image, wherever=True).encode())
        except ValueError:  # not an image; the run records it
            hashed.update(type(image).__name__.encode())
    return hashed.hexdigest()


def plan_digest(plan: pd.DataFrame) -> str:
    """A hash of all rows of a plan."""
    return hashlib.blake2b(plan.to_json(orient="split").encode(), digest_size=16).hexdigest()


# ---- memory -----------------------------------------------------------------------------------


@renamed_attributes
@dataclass(frozen=True)
class Memory:
    """An estimate of the memory of a model's forward, in bytes.

    What `work` keeps besides the logits (such as a cache) is not included.

    Attributes:
        weights: of the whole model, on any device.
        decoder: activations of the largest batch in one block, at all positions.
        logits: at all positions of the largest batch (with `logits_at` only a small part of this is needed).
        tower: activations of the largest image in one block of the tower; images run one at a time.
        embeddings: capacity of the `ImageEmbeddingsCache`.
        gradients: whether activations are kept for gradients, of all blocks, and of all images of a batch at once.
    """

    weights: int
    decoder: int
    logits: int
    tower: int
    embeddings: int
    gradients: bool = False

    @property
    def total(self) -> int:
        """Largest total: tower and decoder do not run at the same time, but gradients need the activations of both."""
        decoder = self.decoder + self.logits
        return self.weights + (decoder + self.tower if self.gradients else max(decoder, self.tower)) + self.embeddings

    def __str__(self) -> str:
        says = {"weights": "weights", "decoder": "decoder, largest batch", "logits": "its logits", "tower": "tower, largest image"}
        needs = ", ".join(f"{words} {in_words(getattr(self, name))}" for name, words in says.items())
        return f"{in_words(self.total)} ({needs}, image embeddings kept for later questions at most {in_words(self.embeddings)})"


def embedding_bytes(model: Model, sizes: Mapping[Size, int]) -> int:
    """Bytes of the image embeddings of all questions, if no two share an image.

    Args:
        sizes: size -> number of questions.
    """
    vision = model.cfg.vision
    each = vision.d_out * model.cfg.dtype.itemsize * (1 + len(vision.deepstack_layers)) // vision.spatial_merge_size**2
    return sum(n * each * sum(h * w for h, w in size.grids) for size, n in sizes.items())


def memory_for(model: Model, sizes: Iterable[tuple[Size, int]], embeddings: int = 0, gradients: bool = False) -> Memory:
    """The memory of the model's forward over batches of these (size, rows).

    Args:
        embeddings: capacity of the `ImageEmbeddingsCache`, in bytes.
        gradients: whether activations of all blocks are kept for a backward pass.
    """
    text, vision = model.cfg.text, model.cfg.vision
    wide = max(model.cfg.dtype.itemsize, 4)  # norms, rotation and softmax are computed in float32
    own = model.cfg.dtype.itemsize
    weights = {id(weight): weight.numel() * weight.element_size() for weight in model.parameters()}
    decoder = logits = tower = 0
    for size, rows in sizes:
        patches = [h * w for h, w in size.grids]
        n_positions = rows * (sum(patches) // vision.spatial_merge_size**2 + size.text + TEMPLATE_TOKENS)
        heads = (2 * text.n_heads + 2 * text.n_key_value_heads) * text.d_head
        decoder = max(decoder, n_positions * (own * (4 * text.d_model + heads + 3 * text.d_mlp) + wide * 2 * text.d_model))
        logits = max(logits, n_positions * own * text.d_vocab)
        each = own * (9 * vision.d_vision + 2 * vision.d_mlp + vision.d_patch) + wide * 2 * vision.d_vision
        tower = max([tower, rows * sum(patches) * each] if gradients else [tower, *(n * each for n in patches)])
    if gradients:
        decoder, tower = decoder * text.n_layers, tower * vision.n_layers
    return Memory(sum(weights.values()), decoder, logits, tower, embeddings, gradients)
