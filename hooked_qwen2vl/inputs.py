"""`Inputs`: an immutable batch of multimodal prompts with the interface of a token tensor.

TransformerLens's functions take it where they expect tokens. Prompts and images cannot be separated: rows are
indexed, repeated and moved together with their images, positions cannot be sliced, and a model refuses token ids
with image placeholders but no images.

It is not a `torch.Tensor`: torch's functions (slicing, concatenation, casts) would return ids without their images, so
torch refuses it as a type error. Use `.tokens` for the ids alone.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .config import HookedQwen2VLConfig
from .geometry import Geometry, Visual
from .moved import renamed_arguments, renamed_attributes
from .positions import IMAGE, TEXT, VIDEO, mrope_positions
from .segments import KINDS, PADDING, number_visuals, segments_from_ids


@renamed_attributes
@dataclass(frozen=True, eq=False, repr=False)
class Inputs(Geometry):
    """A batch of prompts with their images, left-padded.

    Attributes:
        tokens: [batch pos] token ids.
        attention_mask: [batch pos] 1 where there is a token, 0 where there is padding.
        token_types: [batch pos] 0 text, 1 image, 2 video.
        position_ids: [3 batch pos] M-RoPE positions (t, row, col).
        rope_delta: [batch] the next position in decoding is the row's number of tokens + rope_delta.
        segments: for each row, the name of the segment that each position belongs to (see `resolve`).
        visuals: grid, size and row of each image and video, in order of appearance, row by row.
        pixels: [patch d_patch] normalised patches of all visuals, packed in that order, each in the
            tower's order; None without visuals.
        image_embeds: [image_token d_model] the projector's output; None until `model.encode` has computed it.
        deepstack_embeds: [merger image_token d_model] what DeepStack adds in the decoder, computed with image_embeds; None for
            models without DeepStack.
        encoded_by: identifies the weights that computed image_embeds; a model with other weights computes them again.
        encoded_pixels: a checksum of each image's pixels from which image_embeds were computed.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    token_types: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "3 batch pos"]
    rope_delta: Int[Tensor, "batch"]
    segments: tuple[tuple[str, ...], ...]
    visuals: tuple[Visual, ...] = ()
    pixels: Float[Tensor, "patch d_patch"] | None = None
    image_embeds: Float[Tensor, "image_token d_model"] | None = None
    encoded_by: tuple | None = None
    encoded_pixels: tuple[int, ...] = ()
    deepstack_embeds: Float[Tensor, "merger image_token d_model"] | None = None

    # ---- construction -------------------------------------------------------------------------

    @classmethod
    @renamed_arguments
    def build(
        cls,
        tokens: Int[Tensor, "batch pos"],
        cfg: HookedQwen2VLConfig,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        visuals: Sequence[Visual] = (),
        pixels: Float[Tensor, "patch d_patch"] | None = None,
        segments: Sequence[Sequence[str]] | None = None,
    ) -> Inputs:
        """Inputs from tokens and preprocessed images: checks that they match and computes token types and positions.

        Args:
            visuals, pixels: in order of appearance, row by row.
            segments: the segment's name for each position; None infers them from the ids (see `segments.segments_from_ids`).
        Raises:
            ValueError: no tokens, ids outside the vocabulary, more positions than the context, a mask of
                another shape or with padding in the middle, or placeholders, images and pixels that do
                not match.
        """
        _check_shape(tokens)
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"expected integer token ids, got {tokens.dtype}.")
        tokens = tokens.long()
        if int(tokens.min()) < 0 or int(tokens.max()) >= cfg.d_vocab:
            raise ValueError(f"token ids must be in 0..{cfg.d_vocab - 1}, got {int(tokens.min())}..{int(tokens.max())}.")
        if tokens.shape[1] > cfg.n_ctx:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens, the model's context {cfg.n_ctx}: use a smaller image "
                f"(max_pixels=) or a shorter prompt."
            )
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens.device).long()
        _check_mask(mask, tokens)
        types = torch.zeros_like(tokens)
        types[tokens == cfg.image_token_id] = IMAGE
        types[tokens == cfg.video_token_id] = VIDEO
        types = types * mask
        _check_visuals(types, visuals)
        _check_pixels(pixels, visuals, cfg)
        visuals = [replace(visual, window=cfg.vision.window) for visual in visuals]
        position_ids, delta = _positions(types, mask, visuals, cfg)
        return cls(
            tokens=tokens,
            attention_mask=mask,
            token_types=types,
            position_ids=position_ids,
            rope_delta=delta,
            segments=_segment_rows(tokens, mask, types, visuals, segments, cfg),
            visuals=tuple(visuals),
            pixels=pixels,
        )

    @classmethod
    def from_tokens(
        cls,
        tokens: Int[Tensor, "batch pos"] | Int[Tensor, "pos"],
        cfg: HookedQwen2VLConfig,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        padding_side: str | None = None,
    ) -> Inputs:
        """Text-only prompts from token ids.

        Args:
            attention_mask: None infers the padding from the ids (see `padding_mask`).
            padding_side: the side on which the padding id is padding, if the batch leaves that open.
        Raises:
            ValueError: there are image or video placeholders, which need their images, or the padding id could be text.
        """
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if attention_mask is None:
            attention_mask = padding_mask(tokens, cfg.special.pad, padding_side)
        return cls.build(tokens, cfg, attention_mask)

    @classmethod
    def from_processor(
        cls,
        batch: Mapping[str, Any],
        cfg: HookedQwen2VLConfig,
        image_sizes: Sequence[tuple[float, float]] | None = None,
    ) -> Inputs:
        """Inputs from what HF's processor of the model returns (`return_tensors="pt"`), Qwen2.5-VL's `second_per_grid_ts` included.

        The segments of a prompt are inferred from its ids (see `segments.segments_from_ids`).

        Args:
            image_sizes: (width, height) of each image before it was resized, in order. The processor does not
                return them; without them boxes are in pixels of the resized image.
        Raises:
            ValueError: keys missing, or pixels, grids or sizes that do not match the placeholders.
        """
        if "input_ids" not in batch:
            raise ValueError(f"expected the processor's mapping with 'input_ids', got keys {sorted(batch)}.")
        tokens = _rectangle(batch["input_ids"], "input_ids")
        _check_shape(tokens)
        mask = batch.get("attention_mask")
        mask = padding_mask(tokens, cfg.special.pad) if mask is None else _rectangle(mask, "attention_mask")
        _check_mask(mask, tokens)
        packs = {
            IMAGE: _unpack(batch, "pixel_values", "image_grid_thw"),
            VIDEO: _unpack(batch, "pixel_values_videos", "video_grid_thw"),
        }
        if image_sizes is not None and len(image_sizes) != len(packs[IMAGE]):
            raise ValueError(f"expected {len(packs[IMAGE])} image_sizes, one for each image, got {len(image_sizes)}.")
        sizes = iter(image_sizes or ())
        seconds = iter(_seconds(batch, len(packs[VIDEO]), cfg))
        merge, side = cfg.vision.spatial_merge_size, cfg.vision.patch_size
        ids = {cfg.image_token_id: IMAGE, cfg.video_token_id: VIDEO}
        visuals, pixels = [], []
        for row, (row_tokens, row_mask) in enumerate(zip(tokens.tolist(), mask.tolist())):
            kinds = [ids.get(token, TEXT) if seen else TEXT for token, seen in zip(row_tokens, row_mask)]
            position = 0
            while position < len(kinds):
                kind = kinds[position]
                if kind == TEXT or not packs[kind]:
                    position += 1
                    continue
                grid, patches = packs[kind].pop(0)
                resized = (float(grid[2] * side), float(grid[1] * side))
                width, height = map(float, next(sizes, resized) if kind == IMAGE else resized)
                visual = Visual(row, kind, grid, (width, height), merge, seconds_per_frame=next(seconds) if kind == VIDEO else None)
                visuals.append(visual)
                pixels.append(patches)
                position = _end_of(visual, kinds, position)
        if packs[IMAGE] or packs[VIDEO]:
            raise ValueError(
                f"the processor's batch has {len(packs[IMAGE])} images and {len(packs[VIDEO])} videos that no placeholder refers to."
            )
        return cls.build(tokens, cfg, mask, visuals, torch.cat(pixels) if pixels else None)

    @classmethod
    def stack(cls, rows: Sequence[Inputs], cfg: HookedQwen2VLConfig, pad_id: int) -> Inputs:
        """One batch with the rows of several, padded on the left to the longest."""
        width = max(row.shape[1] for row in rows)
        tokens = torch.cat([_pad_left(row.tokens, width, pad_id) for row in rows])
        mask = torch.cat([_pad_left(row.attention_mask, width, 0) for row in rows])
        segments = [(PADDING,) * (width - row.shape[1]) + n for row in rows for n in row.segments]
        visuals, first = [], 0
        for row in rows:
            visuals += [replace(visual, row=visual.row + first) for visual in row.visuals]
            first += len(row)
        pixels = [row.pixels for row in rows if row.pixels is not None]
        return cls.build(tokens, cfg, mask, visuals, torch.cat(pixels) if pixels else None, segments)

    def with_image_embeddings(
        self,
        image_embeds: Float[Tensor, "image_token d_model"],
        encoded_by: tuple,
        deepstack_embeds: Float[Tensor, "merger image_token d_model"] | None = None,
    ) -> Inputs:
        """A copy of the batch with these image embeddings and DeepStack terms (None, or no merger: no DeepStack)."""
        added = deepstack_embeds if deepstack_embeds is not None and len(deepstack_embeds) else None
        return replace(self, image_embeds=image_embeds, encoded_by=encoded_by, encoded_pixels=self._pixel_digests(), deepstack_embeds=added)

    @property
    def image_streams(self) -> Float[Tensor, "stream image_token d_model"]:
        """The image embeddings (stream 0), then the DeepStack term of each merger."""
        images = self.image_embeds[None]
        return images if self.deepstack_embeds is None else torch.cat((images, self.deepstack_embeds))

    @property
    def has_image_embeddings(self) -> bool:
        """Whether there are image embeddings that were computed from the present pixels."""
        return self.image_embeds is not None and self.encoded_pixels == self._pixel_digests()

    def _pixel_digests(self) -> tuple[int, ...]:
        """A checksum of each image's pixels."""
        if self.pixels is None:
            return ()
        raw = self.pixels.detach().cpu().contiguous().view(torch.uint8).numpy()
        ends = np.cumsum([visual.n_patches for visual in self.visuals])
        return tuple(zlib.crc32(part) for part in np.split(raw, ends[:-1]))  # pyright: ignore[reportArgumentType] (an array is a buffer)

    @cached_property
    def has_padding(self) -> bool:
        """Whether any position is padding; computed once, because it waits for the device."""
        return not bool(self.attention_mask.all())

    def extend(self, tokens: Int[Tensor, "batch"], running: Bool[Tensor, "batch"], alive: Sequence[bool] | None = None) -> Inputs:
        """The batch with one generated token appended to each row, of type text whatever its id, in the segment `answer`.

        Args:
            running: False for rows that have ended: their token is padding. alive: the same as a list, if known, which saves
                waiting for the device.
        """
        alive = running.tolist() if alive is None else alive
        mask = running.long()[:, None]
        next_position = self.attention_mask.sum(-1) + self.rope_delta
        segments = [row + ("answer" if one else PADDING,) for row, one in zip(self.segments, alive)]
        longer = replace(
            self,
            tokens=torch.cat((self.tokens, tokens[:, None]), dim=1),
            attention_mask=torch.cat((self.attention_mask, mask), dim=1),
            token_types=torch.cat((self.token_types, torch.zeros_like(mask)), dim=1),
            position_ids=torch.cat((self.position_ids, next_position.expand(3, -1)[..., None]), dim=2),
            segments=tuple(segments),
        )
        longer.__dict__["has_padding"] = self.has_padding or not all(alive)
        return longer

    def left_padded(self) -> Inputs:
        """The same rows with all padding on the left, as decoding needs it; each token keeps its M-RoPE position."""
        return self._in_order(self.attention_mask.argsort(dim=-1, stable=True))

    def right_padded(self) -> Inputs:
        """The same rows with all padding on the right; each token keeps its M-RoPE position."""
        return self._in_order((1 - self.attention_mask).argsort(dim=-1, stable=True))

    def _in_order(self, order: Int[Tensor, "batch pos"]) -> Inputs:
        """Each row with its tokens in another order; each token keeps its M-RoPE position."""
        if torch.equal(order, torch.arange(self.shape[1], device=self.device).expand_as(order)):
            return self
        segments = tuple(tuple(row[place] for place in places) for row, places in zip(self.segments, order.tolist()))
        return replace(
            self,
            tokens=self.tokens.gather(-1, order),
            attention_mask=self.attention_mask.gather(-1, order),
            token_types=self.token_types.gather(-1, order),
            position_ids=self.position_ids.gather(-1, order.expand(3, -1, -1)),
            segments=segments,
        )

    # ---- like a token tensor ------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.tokens.shape

    @property
    def ndim(self) -> int:
        return self.tokens.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.tokens.size() if dim is None else self.tokens.size(dim)

    def dim(self) -> int:
        return self.tokens.dim()

    def numel(self) -> int:
        return self.tokens.numel()

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self):
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Inputs:
        """Some rows with their images, chosen by an int, a slice, a list, an integer tensor or a mask.

        An int gives a batch of one row, [1 pos], not a prompt without a batch axis.

        Raises:
            IndexError: no such row, or an index into positions: a prompt with images cannot be sliced along
                positions; slice the results instead.
        """
        if index is None or index is Ellipsis or isinstance(index, (bool, tuple)):
            raise IndexError(
                "Inputs are indexed by row only: positions cannot be cut out of a prompt that carries images. "
                "Use .tokens[...] for ids, or slice the activations."
            )
        if isinstance(index, Tensor):
            index = index.cpu()
        rows = torch.arange(len(self))[index]
        if rows.ndim > 1:
            raise IndexError(f"expected rows along one axis, got an index of shape {tuple(rows.shape)}.")
        chosen = rows.reshape(-1).tolist()
        patches, embeds = [], []
        visuals: list[Visual] = []
        digests: list[int] = []
        for new_row, row in enumerate(chosen):
            for number, visual in enumerate(self.visuals):
                if visual.row == row:
                    visuals.append(replace(visual, row=new_row))
                    patches.append(self._slice(number, tokens=False))
                    embeds.append(self._slice(number, tokens=True))
                    digests += self.encoded_pixels[number : number + 1]

        def gather(packed: Tensor | None, parts: list[slice], axis: int = 0) -> Tensor | None:
            if packed is None or not parts:
                return None
            return torch.cat([packed.narrow(axis, part.start, part.stop - part.start) for part in parts], dim=axis)

        return replace(
            self,
            tokens=self.tokens[chosen],
            attention_mask=self.attention_mask[chosen],
            token_types=self.token_types[chosen],
            position_ids=self.position_ids[:, chosen],
            rope_delta=self.rope_delta[chosen],
            segments=tuple(self.segments[row] for row in chosen),
            visuals=tuple(visuals),
            pixels=gather(self.pixels, patches),
            image_embeds=gather(self.image_embeds, embeds),
            deepstack_embeds=gather(self.deepstack_embeds, embeds, axis=1),
            encoded_pixels=tuple(digests),
        )

    def row(self, row: int) -> Inputs:
        """One row with its images, as a batch of one, [1 pos].

        Raises:
            ValueError: no such row.
        """
        return self[self._row(row)]

    def repeat(self, *sizes: int) -> Inputs:
        """The batch repeated n times along rows, as by `tensor.repeat(n, 1)`.

        Raises:
            ValueError: another axis than that of the rows is repeated.
        """
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        if len(sizes) not in (1, 2) or any(size != 1 for size in sizes[1:]):
            raise ValueError(f"only rows can be repeated: call repeat(n) or repeat(n, 1), got repeat{sizes}.")
        return self[torch.arange(len(self)).repeat(sizes[0])]

    def to(self, device: torch.device | str | None) -> Inputs:
        """All tensors on the device; the dtypes stay (the model casts pixels to its own).

        Raises:
            ValueError: a dtype was passed.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"Inputs move between devices; their ids stay integers: drop .to({device}).")

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            tokens=move(self.tokens),
            attention_mask=move(self.attention_mask),
            token_types=move(self.token_types),
            position_ids=move(self.position_ids),
            rope_delta=move(self.rope_delta),
            pixels=move(self.pixels),
            image_embeds=move(self.image_embeds),
            deepstack_embeds=move(self.deepstack_embeds),
        )

    def cpu(self) -> Inputs:
        return self.to("cpu")

    def cuda(self) -> Inputs:
        return self.to("cuda")

    def clone(self) -> Inputs:
        """A copy that shares no storage with the original."""
        return self[:]

    def __deepcopy__(self, memo: dict) -> Inputs:
        """A copy that shares no storage; its image embeddings are detached, because an autograd graph cannot be copied."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part.detach().clone() for name, part in parts.items() if isinstance(part, Tensor)})

    def detach(self) -> Inputs:
        """The same batch with pixels and image embeddings detached from the autograd graph."""
        parts = {name: getattr(self, name) for name in ("pixels", "image_embeds", "deepstack_embeds")}
        return replace(self, **{name: None if part is None else part.detach() for name, part in parts.items()})

    def numpy(self) -> np.ndarray:
        """The token ids, without images."""
        return self.tokens.cpu().numpy()

    def __eq__(self, other: Any) -> bool:
        """True if tokens, padding, images and segments are all equal."""
        if not isinstance(other, Inputs):
            return NotImplemented
        same = (
            self.shape == other.shape
            and torch.equal(self.tokens, other.tokens.to(self.device))
            and torch.equal(self.attention_mask, other.attention_mask.to(self.device))
            and self.visuals == other.visuals
            and self.segments == other.segments
        )
        if not same or self.pixels is None or other.pixels is None:
            return same and self.pixels is other.pixels
        return torch.equal(self.pixels, other.pixels.to(self.device))

    __hash__ = None  # pyright: ignore[reportAssignmentType] (not hashable, as a tensor of tokens is not to be)

    def __repr__(self) -> str:
        images = sum(visual.kind == IMAGE for visual in self.visuals)
        videos = len(self.visuals) - images
        encoded = ", encoded" if self.image_embeds is not None else ""
        return f"Inputs(batch {len(self)}, pos {self.shape[1]}, images {images}, videos {videos}{encoded})"


def padding_left(tokenizer: Any) -> Any:
    """The tokenizer if it pads on the left, else a copy of it that does."""
    if tokenizer.padding_side != "left":
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "left"
    return tokenizer


def padding_mask(tokens: Int[Tensor, "batch pos"], pad: int | None, padding_side: str | None = None) -> Int[Tensor, "batch pos"]:
    """The attention mask inferred from the ids: 0 for padding ids at the ends of a row, 1 elsewhere.

    Args:
        pad: the padding id; None: there is no padding.
        padding_side: "left" or "right": padding ids at that end are padding, without the checks below; at the other end they
            are text.
    Raises:
        ValueError: the padding id could be text: every row begins with it, every row ends with it, or a row has it inside.
    """
    mask = torch.ones_like(tokens)
    if pad is None or tokens.ndim != 2:
        return mask
    text = tokens != pad
    before, after = text.cumsum(-1) == 0, text.flip(-1).cumsum(-1).flip(-1) == 0
    padding = {"left": before, "right": after}.get(padding_side or "", before | after)
    if padding_side is None and bool(padding.any()):
        for suspect, where in (
            (before[:, 0].all(), "every row begins with it"),
            (after[:, -1].all(), "every row ends with it"),
            ((~text & ~padding).any(), "it stands at the end of one row and inside another"),
        ):
            if suspect:
                raise ValueError(
                    f"token {pad} is the padding's, and {where}: the ids do not tell whether it is text there. Pass "
                    f"attention_mask=, [batch pos], 1 where there is a token: torch.ones_like(tokens) if it is text."
                )
    return mask.masked_fill(padding, 0)


def _positions(
    types: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], visuals: Sequence[Visual], cfg: HookedQwen2VLConfig
) -> tuple[Int[Tensor, "3 batch pos"], Int[Tensor, "batch"]]:
    """(M-RoPE positions, rope deltas). A video's frames are placed by their number (Qwen2-VL), by their time (Qwen2.5-VL), or
    each like an image after its timestamp in the text (Qwen3-VL)."""
    grids: dict[int, list[tuple[int, int, int]]] = {IMAGE: [], VIDEO: []}
    steps: list[float] = []
    rate = cfg.vision.tokens_per_second
    for visual in visuals:
        t, h, w = visual.grid
        frames = [(1, h, w)] * t if cfg.vision.timestamps and visual.kind == VIDEO else [visual.grid]
        grids[visual.kind] += frames
        if visual.kind == VIDEO:
            step = 1.0 if rate is None else float(torch.tensor(visual.seconds_per_frame, dtype=torch.float32) * rate)
            steps += [step] * len(frames)
    image_grids, video_grids = (torch.tensor(grids[kind], dtype=torch.long).reshape(-1, 3) for kind in (IMAGE, VIDEO))
    return mrope_positions(types, mask, image_grids, video_grids, cfg.vision.spatial_merge_size, steps)


# torch.load only makes objects of classes that it knows to be safe; these hold tensors, numbers and names.
torch.serialization.add_safe_globals([Inputs, Visual])


def _pad_left(rows: Int[Tensor, "batch pos"], width: int, value: int) -> Int[Tensor, "batch width"]:
    return torch.nn.functional.pad(rows, (width - rows.shape[1], 0), value=value)


def _check_shape(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"expected tokens [batch pos] with at least one token, got shape {tuple(tokens.shape)}.")


def _check_mask(mask: Tensor, tokens: Tensor) -> None:
    if mask.shape != tokens.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"expected an attention mask of zeros and ones like the tokens {tuple(tokens.shape)}, got {tuple(mask.shape)}.")
    if not bool(mask.any(-1).all()):
        raise ValueError("a prompt is empty: every row needs at least one token that is not padding.")
    begins = torch.nn.functional.pad(mask, (1, 0)).diff(dim=-1) == 1
    if bool((begins.sum(-1) > 1).any()):
        raise ValueError("a prompt has padding in its middle: the mask must be ones in a row, padding at the ends.")


def _check_visuals(types: Int[Tensor, "batch pos"], visuals: Sequence[Visual]) -> None:
    for row, kinds in enumerate(types.tolist()):
        for kind, word in KINDS.items():
            here = [v for v in visuals if v.row == row and v.kind == kind]
            expected, found = sum(v.n_tokens for v in here), kinds.count(kind)
            if expected == found:
                continue
            if not here:
                raise ValueError(
                    f"row {row} has {found} {word} placeholders but no {word}: a prompt with an {word} is never run "
                    f"without it. Build both with model.to_inputs(prompt, {word}s=[…])."
                )
            if not found:
                raise ValueError(f"row {row} has {len(here)} {word}s that no placeholder of its prompt refers to.")
            grids = ", ".join(f"{v.grid[1]}×{v.grid[2]} patches" for v in here)
            raise ValueError(
                f"row {row} has {found} {word} tokens but its {word}s give {expected} (grid {grids}, "
                f"{here[0].merge}×{here[0].merge} merged); build both with model.to_inputs."
            )
        asked = [kind for kind in kinds if kind != TEXT]
        given = [visual.kind for visual in visuals if visual.row == row for _ in range(visual.n_tokens)]
        if asked != given:
            raise ValueError(f"row {row}: its images and videos are not in the order of their placeholders.")
    places = [visual.row for visual in visuals]
    if places != sorted(places) or (places and places[-1] >= len(types)):
        raise ValueError(f"images must come row by row of the {len(types)} prompts, got them for rows {places}.")


def _check_pixels(pixels: Tensor | None, visuals: Sequence[Visual], cfg: HookedQwen2VLConfig) -> None:
    expected = (sum(visual.n_patches for visual in visuals), cfg.vision.d_patch)
    if pixels is None and not visuals:
        return
    if pixels is None or tuple(pixels.shape) != expected or not pixels.is_floating_point():
        came = "none" if pixels is None else f"{tuple(pixels.shape)} of {pixels.dtype}"
        raise ValueError(
            f"the images need normalised pixels {expected} (patches, and channels × frames × height × width of each), "
            f"got {came}: build them with this checkpoint's own processor."
        )


def _segment_rows(
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    types: Int[Tensor, "batch pos"],
    visuals: Sequence[Visual],
    segments: Sequence[Sequence[str]] | None,
    cfg: HookedQwen2VLConfig,
) -> tuple[tuple[str, ...], ...]:
    """The segment of every position, as given or else inferred from the ids."""
    named = []
    for row, seen in enumerate(mask.bool()):
        kinds = types[row][seen].tolist()
        if segments is None:
            frames = [v.grid[0] for v in visuals if v.row == row and v.kind == VIDEO and cfg.vision.timestamps]
            known = segments_from_ids(tokens[row][seen].tolist(), kinds, cfg, frames)
        else:
            known = [name for name, real in zip(segments[row], seen.tolist()) if real]
        here = [(visual.kind, visual.n_tokens) for visual in visuals if visual.row == row]
        following = iter(number_visuals(known, kinds, here))
        named.append(tuple(next(following) if real else PADDING for real in seen.tolist()))
    return tuple(named)


def _rectangle(values: Any, key: str) -> Int[Tensor, "batch pos"]:
    try:
        return torch.as_tensor(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key} is not one rectangle ({error}): call the processor with padding=True, return_tensors='pt'.") from error


def _end_of(visual: Visual, kinds: Sequence[int], start: int) -> int:
    """The position after a visual's last placeholder; there may be other tokens between a video's frames."""
    left = visual.n_tokens
    for position in range(start, len(kinds)):
        left -= kinds[position] == visual.kind
        if not left:
            return position + 1
    return len(kinds)


def _seconds(batch: Mapping[str, Any], n_videos: int, cfg: HookedQwen2VLConfig) -> list[float | None]:
    """For each video, seconds per frame of its grid; None if the model's positions do not depend on time."""
    given = batch.get("second_per_grid_ts")
    if cfg.vision.tokens_per_second is None:
        if given is not None:
            raise ValueError("second_per_grid_ts came with the batch, but this model's positions know no time: it is Qwen2.5-VL's.")
        return [None] * n_videos
    if given is None:
        return [1.0] * n_videos  # transformers' default
    seconds = torch.as_tensor(given).flatten().tolist()
    if len(seconds) != n_videos or not all(0 < second < float("inf") for second in seconds):
        raise ValueError(f"expected second_per_grid_ts to be {n_videos} numbers above 0, one for each video, got {seconds}.")
    return seconds


def _unpack(batch: Mapping[str, Any], pixels: str, grids: str) -> list[tuple[tuple[int, int, int], Tensor]]:
    """(grid, patches) of each image, or each video, of a processor's batch."""
    if batch.get(pixels) is None and batch.get(grids) is None:
        return []
    if batch.get(pixels) is None or batch.get(grids) is None:
        raise ValueError(f"expected {pixels} and {grids} together, got only one of them.")
    packed, grid_list = torch.as_tensor(batch[pixels]), torch.as_tensor(batch[grids]).tolist()
    sizes = [t * h * w for t, h, w in grid_list]
    if sum(sizes) != len(packed):
        raise ValueError(f"{pixels} has {len(packed)} patches but {grids} gives {sum(sizes)}.")
    return [(tuple(grid), patches) for grid, patches in zip(grid_list, packed.split(sizes))]
