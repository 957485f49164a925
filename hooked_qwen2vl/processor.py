"""Turns prompts, chat messages, images and videos into `Inputs`, as the reference processor does.

    messages ─► chat template ─► text with one placeholder per image ─► one placeholder per image token ─► token ids
    images ─► resized to multiples of an image token's side (28 pixels; 32 in Qwen3-VL) ─► normalised patches

The template is rendered with markers in place of the texts, so that the segment of every token is known. An answer is tokenised
separately, like a generated answer: its first token never merges with the prompt's last. torchvision is not needed: videos are
lists of frames, and a video's patches are combined from its frames' patches. In Qwen3-VL, every frame of the grid (two frames of
the video) comes after its time:

    <|vision_start|><|video_pad|><|vision_end|> ─► <0.2 seconds><|vision_start|><|video_pad|>…<|vision_end|><1.2 seconds>…
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resized_frames

from .config import HookedQwen2VLConfig
from .inputs import Inputs, Visual, padding_left
from .limits import time_limit
from .pictures import SIZE_KEYS, Element, ImageLike, VideoLike, element, open_image, short
from .positions import IMAGE, VIDEO
from .processor_files import (
    SETTINGS,
    VIDEO_SIZE,
    Templates,
    chat_templates,
    image_processor,
    image_settings,
    named_templates,
    read_tokenizer,
    video_settings,
)
from .prompt_text import Segment, tokenize_segments

TEMPLATE_SECONDS = 10.0
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
_PLACEHOLDER = re.compile(r"((?:<\|vision_start\|>)?(?:<\|image_pad\|>|<\|video_pad\|>)(?:<\|vision_end\|>)?)")
_MARK = "\ue000{}\ue001"  # private-use characters: they occur in no prompt
_MARKED = re.compile("\ue000(\\d+)\ue001")
_OPEN_THOUGHT, _END_OF_THOUGHT = re.compile(r"<think>\s*$"), "</think>"


@dataclass
class Processor:
    """A checkpoint's tokenizer, chat template and image settings.

    Attributes:
        tokenizer: a fast tokenizer with Qwen2-VL's special tokens.
        image_processor: resizes, normalises and cuts images into patches.
        chat_template: Jinja source, or several by name.
        video_size: {"shortest_edge", "longest_edge"}: smallest and largest area in pixels of a video's frame; in Qwen3-VL, of all its
            frames together.
        video_processor: normalises the frames of videos; None: the image processor does.
        video_budget: largest number of pixels of a video; None if the checkpoint has no such limit (`cap_pixels_per_frame`).
    """

    tokenizer: Any
    image_processor: Qwen2VLImageProcessorPil
    chat_template: Templates = None
    video_size: dict[str, int] | None = None
    video_processor: Qwen2VLImageProcessorPil | None = None
    video_budget: int | None = None

    def __post_init__(self) -> None:
        self.tokenizer = padding_left(self.tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Processor:
        """Reads the tokenizer, the image and video settings and the chat template of a checkpoint folder; see `processor_files`.

        Raises:
            ValueError: one of these is missing or unreadable.
        """
        folder = Path(folder)
        tokenizer = read_tokenizer(folder)
        images = image_processor(*image_settings(folder))
        return cls(tokenizer, images, chat_templates(folder, tokenizer), **_video(*video_settings(folder), images))

    @classmethod
    def from_hf(cls, processor: Any) -> Processor:
        """From transformers' Qwen2VLProcessor, or any object with its tokenizer and image processor."""
        where = type(processor).__name__
        theirs, video = processor.image_processor, getattr(processor, "video_processor", None)
        template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        images = image_processor(theirs.to_dict(), f"{where}.image_processor")
        videos: dict[str, Any] = (
            {"video_size": dict(images.size)} if video is None else _video(video.to_dict(), f"{where}.video_processor", images)
        )
        return cls(processor.tokenizer, images, named_templates(template, where), **videos)

    # ---- prompts ------------------------------------------------------------------------------

    def to_inputs(
        self,
        cfg: HookedQwen2VLConfig,
        prompt: str | Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        answers: str | Sequence[str | None] | None = None,
        messages: Sequence[Any] | None = None,
        template: bool | str = True,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | Sequence[float] | None = None,
        special_tokens: bool = False,
    ) -> Inputs:
        """One prompt, a batch of prompts, or chat messages, with their images; see `HookedQwen2VL.to_inputs`."""
        self._check_fit(cfg)
        bounds = _pixel_bounds(min_pixels, max_pixels)
        conversations = list(self._conversations(prompt, images, videos, answers, messages, template, system, special_tokens))
        shown = [media for _, medias in conversations for kind, media in medias if kind == VIDEO]
        rates = iter(_frame_rates(_stated_rates(shown, fps, cfg.vision.needs_fps), len(shown), cfg.vision.needs_fps))
        rows = [self._row(cfg, segments, medias, bounds, rates) for segments, medias in conversations]
        return rows[0] if len(rows) == 1 else Inputs.stack(rows, cfg, self._pad_id())

    def _conversations(
        self, prompt, images, videos, answers, messages, template, system, special_tokens
    ) -> Iterator[tuple[list[Segment], list[tuple[int, Any]]]]:
        """(segments, images and videos in order of appearance) of each row."""
        if (prompt is None) == (messages is None):
            raise ValueError("expected either a prompt (a string or several) or messages=, not both and not neither.")
        if messages is not None:
            if images is not None or videos is not None or system is not None or not template:
                raise ValueError("messages= carry their own images, videos and system text; pass nothing beside them.")
            batch = _chats(messages)
            for chat, answer in zip(batch, _per_row(answers, len(batch), "answers")):
                yield self._render(chat, answer, template, special_tokens)
            return
        single = isinstance(prompt, str)
        prompts = [prompt] if single else list(prompt) if isinstance(prompt, (list, tuple)) else []
        if not prompts:
            raise ValueError(f"expected a prompt or a list of at least one, got {short(prompt)}.")
        row_images = _media_rows(images, len(prompts), single, "images")
        row_videos = _media_rows(videos, len(prompts), single, "videos")
        row_answers = _per_row(answers, len(prompts), "answers")
        if any(isinstance(text, dict) for text in prompts):
            raise ValueError(f"a prompt is a message, {short(prompts[0])}: pass chat messages by name, messages=[…].")
        for text, ims, vids, answer in zip(prompts, row_images, row_videos, row_answers):
            if not isinstance(text, str) or not (text.strip() or ims or vids):
                raise ValueError(f"a prompt is empty: expected text to ask, got {short(text)}.")
            if template:
                yield self._render(_as_messages(text, ims, vids, system, special_tokens), answer, template, special_tokens)
            else:
                if system is not None:
                    raise ValueError("a system prompt needs the chat template: leave template=True.")
                yield _without_template(text, ims, vids, answer, special_tokens)

    def _render(
        self, messages: list[dict], answer: str | None, template: bool | str, special_tokens: bool
    ) -> tuple[list[Segment], list[tuple[int, Any]]]:
        """Renders chat messages with the template; returns their segments, and images and videos in order."""
        source = self._template(template)
        marked, contents, medias, final = _mark(messages, typed=not special_tokens)
        rendered = self._apply(source, marked, add_generation_prompt=not final, continue_final_message=final)
        segments = []
        for index, piece in enumerate(_MARKED.split(rendered)):
            if index % 2:
                segments.append(contents[int(piece)])
            else:
                segments += _template_parts(piece, first=not segments)
        missing = len(contents) - sum(index % 2 for index, _ in enumerate(_MARKED.split(rendered)))
        if missing:
            raise ValueError(f"the chat template dropped {missing} of the {len(contents)} texts of the conversation.")
        shown = _filled(self._apply(source, marked) if final else rendered, contents)
        if shown != (whole := self._apply(source, _filled(marked, contents), add_generation_prompt=not final)):
            raise ValueError(_changed(shown, whole))
        if answer is not None:
            if final:
                raise ValueError("the messages end with the assistant's turn and answers= is given: use one of them.")
            if _OPEN_THOUGHT.search(rendered) and _END_OF_THOUGHT not in answer:
                warnings.warn(
                    f"the chat template opens a thought (<think>), so that the answer {short(answer)} is read as the beginning of "
                    f"the thought. For an answer without a thought, put {_END_OF_THOUGHT!r} and an empty line before it.",
                    stacklevel=2,
                )
            segments.append(Segment(answer, "answer", not special_tokens))
        return segments, medias

    def _apply(self, source: str, messages: list[dict], **how: bool) -> str:
        """The messages, rendered with a chat template."""
        try:
            with time_limit(TEMPLATE_SECONDS, "the chat template of the checkpoint"):
                return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=source, **how)
        except (ValueError, MemoryError):
            raise
        except Exception as error:  # a template is a program and can raise anything
            why = " ".join(str(error).split())[:300].rstrip(".")
            raise ValueError(f"the checkpoint's chat template cannot be applied ({type(error).__name__}: {why}).") from error

    def _template(self, name: bool | str) -> str:
        """The source of a chat template: the only one, the one called "default", or the one of the given name."""
        templates = self.chat_template
        if templates is None:
            raise ValueError("this checkpoint has no chat template: use template=False, as base models want.")
        named = {"default": templates} if isinstance(templates, str) else templates
        wanted = name if isinstance(name, str) else "default"
        if wanted not in named:
            raise ValueError(
                f"this checkpoint has no chat template {short(wanted)}: pass template= one of {', '.join(map(repr, sorted(named)))}."
            )
        return named[wanted]

    def _row(
        self,
        cfg: HookedQwen2VLConfig,
        segments: list[Segment],
        medias: list[tuple[int, Any]],
        bounds: dict[str, int],
        rates: Iterator[float | None],
    ) -> Inputs:
        """`Inputs` of one prompt, with placeholders expanded and every token assigned to its segment.

        Args:
            rates: frames per second of this prompt's videos, followed by those of the next prompts.
        """
        placed = "".join(segment.text for segment in segments if not segment.typed)
        placeholders = re.findall(f"{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)}", placed)
        for kind, pad, word in ((IMAGE, IMAGE_PAD, "image"), (VIDEO, VIDEO_PAD, "video")):
            given, asked = sum(k == kind for k, _ in medias), placeholders.count(pad)
            if given != asked:
                raise ValueError(f"the prompt refers to {asked} {word}s ({pad}) but {given} {word}s came with it: pass one for each.")
        medias = [(kind, list(m) if isinstance(m, Iterator) else m) for kind, m in _in_order(placeholders, medias)]
        whole = cfg.vision.timestamps  # whether a video's frames share its pixels
        processed = [self._image(m, bounds) if kind == IMAGE else self._video(m, bounds, whole) for kind, m in medias]
        merge, pair = self.image_processor.merge_size, self.image_processor.temporal_patch_size
        fps = [next(rates) if kind == VIDEO else None for kind, _ in medias]
        visuals = [
            Visual(0, kind, grid, size, merge, seconds_per_frame=pair / rate if rate and cfg.vision.tokens_per_second else None)
            for (kind, _), (_, grid, size), rate in zip(medias, processed, fps)
        ]
        times = [_timestamps(len(m), pair, rate) if whole and rate else None for (_, m), rate in zip(medias, fps)]
        ids, names = self._tokenize(list(_expanded(segments, visuals, times)))
        pixels = torch.cat([patches for patches, _, _ in processed]) if processed else None
        return Inputs.build(torch.tensor([ids], dtype=torch.long).reshape(1, -1), cfg, None, visuals, pixels, [names])

    def _tokenize(self, segments: list[Segment]) -> tuple[list[int], list[str]]:
        """(token ids, segment of each token). The prompt is tokenised as a whole, so that segment boundaries do not change its tokens,
        then the answer; a token belongs to the segment in which it starts."""
        first = next((index for index, segment in enumerate(segments) if segment.name == "answer"), len(segments))
        prompt, answer = (tokenize_segments(self.tokenizer, stretch) for stretch in (segments[:first], segments[first:]))
        return prompt[0] + answer[0], prompt[1] + answer[1]

    def _check_fit(self, cfg: HookedQwen2VLConfig) -> None:
        """Raises ValueError for a processor that does not fit the model."""
        ours, theirs = self.image_processor, cfg.vision
        pairs = {
            IMAGE_PAD: (self.tokenizer.convert_tokens_to_ids(IMAGE_PAD), cfg.image_token_id),
            VIDEO_PAD: (self.tokenizer.convert_tokens_to_ids(VIDEO_PAD), cfg.video_token_id),
            "patch_size": (ours.patch_size, theirs.patch_size),
            "temporal_patch_size": (ours.temporal_patch_size, theirs.temporal_patch_size),
            "merge_size": (ours.merge_size, theirs.spatial_merge_size),
        }
        if (video := self.video_processor) is not None:
            pairs["a video's patch_size"] = (video.patch_size, theirs.patch_size)
            pairs["a video's temporal_patch_size"] = (video.temporal_patch_size, theirs.temporal_patch_size)
            pairs["a video's merge_size"] = (video.merge_size, theirs.spatial_merge_size)
        wrong = [f"{key} is {mine} here and {its} in the model" for key, (mine, its) in pairs.items() if mine != its]
        if wrong:
            raise ValueError(f"this processor belongs to another checkpoint: {'; '.join(wrong)}.")

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    # ---- images and videos --------------------------------------------------------------------

    def _image(
        self, image: ImageLike, bounds: dict[str, int]
    ) -> tuple[Float[Tensor, "patch d_patch"], tuple[int, int, int], tuple[float, float]]:
        """(patches in the tower's order, grid (t, h, w), original size (width, height))."""
        given = image if isinstance(image, Element) else Element(image, {})
        original = open_image(given.content)
        picture = given.resized(original, self.image_processor.patch_size * self.image_processor.merge_size)
        size = _bounded(self.image_processor.size, bounds, "an image")
        processed = self.image_processor(images=[picture], size=size, return_tensors="pt")
        return processed["pixel_values"], tuple(processed["image_grid_thw"][0].tolist()), original.size

    def _video(
        self, video: VideoLike, bounds: dict[str, int], whole: bool = False
    ) -> tuple[Float[Tensor, "patch d_patch"], tuple[int, int, int], tuple[float, float]]:
        """As `_image`, for frames: two frames share patches; with an odd number of frames, the last one is repeated.

        Args:
            whole: whether the bounds are for all frames together, as in Qwen3-VL.
        """
        given = video if isinstance(video, Element) else Element(video, {})
        video = given.content
        if isinstance(video, Image.Image) or not hasattr(video, "__iter__") or isinstance(video, (str, Path)):
            raise ValueError(
                f"expected a video as a list of frames or an array [t, h, w, 3], got {type(video).__name__}: pass "
                f"videos=[frames], a list of videos."
            )
        frames = [open_image(frame) for frame in video]
        if not frames:
            raise ValueError("a video has no frames: expected a list of images or an array [t, h, w, 3].")
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise ValueError(f"the frames of a video differ in size: {sorted(sizes)}; resize them alike.")
        original, processor = frames[0].size, self.video_processor or self.image_processor
        frames = [given.resized(frame, processor.patch_size * processor.merge_size) for frame in frames]
        pair, size = processor.temporal_patch_size, _bounded(self.video_size or processor.size, bounds, "a video's frame")
        if self.video_budget is not None and whole:
            share = max(min(self.video_budget, size["longest_edge"] // len(frames)), int(size["shortest_edge"] * 1.05))
            size["longest_edge"] = share * len(frames)
        elif self.video_budget is not None:
            share = self.video_budget * pair // len(frames)
            size["longest_edge"] = max(min(size["longest_edge"], share), int(size["shortest_edge"] * 1.05))
        resizer = _resizer_of_frames(processor, frames, size) if whole else processor
        frames += [frames[-1]] * (-len(frames) % pair)
        processed = resizer(images=frames, size=size, return_tensors="pt")
        _, h, w = processed["image_grid_thw"][0].tolist()
        t, side = len(frames) // pair, processor.patch_size
        # the processor repeats every image `pair` times in time: take the n-th copy from the n-th frame of each group
        patches = processed["pixel_values"].reshape(t, pair, h * w, -1, pair, side * side)
        mixed = torch.stack([patches[:, n, :, :, n] for n in range(pair)], dim=3)
        return mixed.reshape(t * h * w, -1), (t, h, w), original


def _resizer_of_frames(ours: Qwen2VLImageProcessorPil, frames: list[Image.Image], bounds: dict[str, int]) -> Qwen2VLImageProcessorPil:
    """An image processor that resizes to the size that Qwen3-VL uses for this number of frames of this size.

    Raises:
        ValueError: fewer frames than a patch needs.
    """
    width, height = frames[0].size
    if len(frames) < ours.temporal_patch_size:
        raise ValueError(f"expected a video of at least {ours.temporal_patch_size} frames, got {len(frames)}: pass one frame as an image.")
    side = ours.patch_size * ours.merge_size
    low, high = bounds["shortest_edge"], bounds["longest_edge"]
    rows, cols = resized_frames(len(frames), height, width, ours.temporal_patch_size, side, low, high)
    return _FixedSize(rows, cols, ours)


class _FixedSize(Qwen2VLImageProcessorPil):
    """An image processor with the settings of another one, and one size for all images."""

    def __init__(self, height: int, width: int, other: Qwen2VLImageProcessorPil):
        super().__init__(**{key: value for key, value in other.to_dict().items() if key in SETTINGS})
        self.fixed = SizeDict(height=height, width=width)

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any, factor: int, **kwargs: Any) -> np.ndarray:
        return PilBackend.resize(self, image=image, size=self.fixed, resample=resample)


def _stated_rates(videos: list[Any], fps: float | Sequence[float] | None, needed: bool) -> float | Sequence[float] | None:
    """`fps`, or the rates in the messages; Qwen2-VL's reference accepts rates in messages, without effect."""
    stated: list[Any] = [video.settings.get("fps") if isinstance(video, Element) else None for video in videos]
    if not any(stated):
        return fps
    if fps is not None or None in stated:
        raise ValueError("some of the messages' videos state their fps: let each state its own, and leave fps= out.")
    return stated if needed else None


def _frame_rates(fps: float | Sequence[float] | None, n_videos: int, needed: bool) -> Sequence[float | None]:
    """Frames per second of each video; None if the model does not use them."""
    if not needed:
        if fps is not None:
            raise ValueError("fps= would have no effect: this model's positions count a video's frames, not seconds. Drop it.")
        return [None] * n_videos
    if fps is None and n_videos:
        raise ValueError(
            "this model is told when the frames of a video are shown: pass fps=, how many of the given frames there are a second "
            "(a number, or one for each video)."
        )
    if fps is None:
        return []
    rates: list[Any] = list(fps) if isinstance(fps, (list, tuple)) else [fps] * max(n_videos, 1)
    if len(rates) != n_videos:
        raise ValueError(f"expected fps= for {n_videos} videos, one number for all or one for each, got {short(fps)}.")
    if not all(isinstance(rate, Real) and not isinstance(rate, bool) and 0 < cast(Any, rate) < float("inf") for rate in rates):
        raise ValueError(f"fps is how many frames there are a second, a number above 0, got {short(fps)}.")
    return [float(rate) for rate in rates]


def _timestamps(n_frames: int, pair: int, fps: float) -> list[str]:
    """The text before each frame of the grid: the mean time of its first and last frame; the last frame may be repeated."""
    seconds = [min(frame, n_frames - 1) / fps for frame in range(n_frames + -n_frames % pair)]
    return [f"<{(seconds[t] + seconds[t + pair - 1]) / 2:.1f} seconds>" for t in range(0, len(seconds), pair)]


def _expanded(segments: list[Segment], visuals: Sequence[Visual], times: Sequence[list[str] | None]) -> Iterator[Segment]:
    """The segments with one placeholder per image token, and with the timestamps of a video's frames if it has them."""
    following, n_videos = iter(zip(visuals, times)), 0
    for segment in segments:
        if segment.typed:
            yield segment
            continue
        for piece in _PLACEHOLDER.split(segment.text):
            pad = next((pad for pad in (IMAGE_PAD, VIDEO_PAD) if pad in piece), None)
            if pad is None:
                if piece:
                    yield Segment(piece, segment.name)
                continue
            visual, stamps = next(following)
            if stamps is None:
                yield Segment(piece.replace(pad, pad * visual.n_tokens), segment.name)
            else:
                frame = f"<|vision_start|>{pad * (visual.n_tokens // len(stamps))}<|vision_end|>"
                for t, stamp in enumerate(stamps):
                    yield Segment(stamp, f"video[{n_videos}].time[{t}]")
                    yield Segment(frame, segment.name)
            n_videos += visual.kind == VIDEO


def _pixel_bounds(min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    """The given areas in pixels, under the image processor's names."""
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is an area in pixels, a positive whole number, got {short(value)}.")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise ValueError(f"min_pixels = {min_pixels} is more than max_pixels = {max_pixels}.")
    bounds = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return {name: value for name, value in bounds.items() if value is not None}


def _bounded(size: Mapping[str, int], bounds: dict[str, int], what: str) -> dict[str, int]:
    """The checkpoint's bounds, replaced by the caller's where given.

    Raises:
        ValueError: the smallest area is larger than the largest.
    """
    size = {**dict(size), **bounds}
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"{what} would have at least {size['shortest_edge']} pixels (min_pixels) and at most {size['longest_edge']} (max_pixels): pass "
            f"min_pixels= and max_pixels= that leave room."
        )
    return size


def _as_messages(text: str, images: list, videos: list, system: str | None, special_tokens: bool) -> list[dict]:
    """The messages of a user turn, images first; with special_tokens, placeholders in the text decide where images go."""
    turn: list[dict] = [] if system is None else [{"role": "system", "content": system}]
    if special_tokens and (IMAGE_PAD in text or VIDEO_PAD in text):
        return [*turn, {"role": "user", "content": [{"type": "text", "text": text}], "_medias": (images, videos)}]
    content = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": video} for video in videos]
    return [*turn, {"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _without_template(
    text: str, images: list, videos: list, answer: str | None, special_tokens: bool
) -> tuple[list[Segment], list[tuple[int, Any]]]:
    """Segments and media of a prompt without chat template: images, then the text."""
    medias = [(IMAGE, image) for image in images] + [(VIDEO, video) for video in videos]
    segments = []
    if not special_tokens or (IMAGE_PAD not in text and VIDEO_PAD not in text):
        pads = [IMAGE_PAD if kind == IMAGE else VIDEO_PAD for kind, _ in medias]
        segments = [Segment(f"<|vision_start|>{pad}<|vision_end|>", "template") for pad in pads]
    segments.append(Segment(text, "question", not special_tokens))
    return segments + ([] if answer is None else [Segment(answer, "answer", not special_tokens)]), medias


def _chats(messages: Any) -> list[list[dict]]:
    """A list of conversations, from one or several."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"expected messages=[{{'role': 'user', 'content': …}}, …] or a list of such, got {short(messages)}.")
    chats = [list(messages)] if isinstance(messages[0], dict) else [list(chat) for chat in messages]
    for chat in chats:
        if not all(isinstance(message, dict) for message in chat):
            raise ValueError(f"expected every message to be {{'role': …, 'content': …}}, got {short(chat)}.")
    return chats


def _mark(messages: list[dict], typed: bool = True) -> tuple[list[dict], list[Segment], list[tuple[int, Any]], bool]:
    """(messages with markers in place of texts, the texts as segments, images and videos in order, whether the conversation ends with
    a turn of the assistant)."""
    final = messages[-1].get("role") == "assistant" if messages else False
    turns = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    if not turns:
        raise ValueError("expected at least one message of the user: [{'role': 'user', 'content': …}].")
    marked, contents, medias = [], [], []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {index} has role {short(role)}: expected 'system', 'user' or 'assistant'.")
        name = {"system": "system", "user": "question" if index == turns[-1] else "history"}.get(
            role, "answer" if final and index == len(messages) - 1 else "history"
        )
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, (list, tuple)) or not items:
            raise ValueError(f"message {index} has no content: expected a string or a list of parts.")
        out = []
        for item in items:
            kind = item.get("type") if isinstance(item, dict) else None
            own: dict[Any, tuple[str, ...]] = {"text": (), "image": SIZE_KEYS, "video": (*SIZE_KEYS, "fps")}
            unknown = sorted(map(str, set(item) - {"type", kind, *own[kind]})) if kind in own else []
            if unknown:
                raise ValueError(
                    f"message {index} has a part of type {kind!r} with {short(unknown)}, which would have no effect: expected "
                    f"{', '.join(map(repr, ('type', kind, *own[kind])))}."
                )
            if kind == "text":
                if not isinstance(item.get("text"), str):
                    raise ValueError(f"message {index} has a text part without text: {short(item)}.")
                out.append({"type": "text", "text": _MARK.format(len(contents))})
                contents.append(Segment(item["text"], name, typed))
            elif kind in ("image", "video"):
                media = item.get(kind)
                if media is None:
                    raise ValueError(f"message {index} has a part of type {kind!r} without its {kind!r}.")
                out.append({"type": kind, kind: ""})
                settings = {key: item[key] for key in own[kind] if item.get(key) is not None}
                medias.append((IMAGE if kind == "image" else VIDEO, element(kind, media, settings)))
            else:
                raise ValueError(f"message {index} has the part {short(item)}: expected a 'type' of 'text', 'image' or 'video'.")
        images, videos = message.get("_medias", ((), ()))
        medias += [(IMAGE, image) for image in images] + [(VIDEO, video) for video in videos]
        if role != "user" and all(item["type"] == "text" for item in out):
            out = "".join(item["text"] for item in out)
        marked.append({"role": role, "content": out})
    if not medias and not any(segment.text.strip() for segment in contents):
        raise ValueError("the conversation has no text and no image: ask something.")
    return marked, contents, medias, final


def _filled(marked: Any, contents: list[Segment]) -> Any:
    """Messages, or a rendered conversation, with the texts in the places of their markers."""
    if isinstance(marked, str):
        return _MARKED.sub(lambda found: contents[int(found[1])].text, marked)
    if isinstance(marked, dict):
        return {key: _filled(value, contents) for key, value in marked.items()}
    return [_filled(value, contents) for value in marked]


def _changed(ours: str, theirs: str) -> str:
    """What is said of a template that reads the texts it is given."""
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    near = slice(max(0, at - 20), at + 30)
    return (
        f"the chat template changes a text of the conversation: {short(ours[near])} becomes {short(theirs[near])} (it may strip white "
        f"space, or take out an assistant's thoughts before </think>). Pass the text as the template leaves it."
    )


def _template_parts(text: str, first: bool) -> list[Segment]:
    """The segments of a part of the rendered template; a default system prompt becomes the segment `system`."""
    default = re.match(r"(<\|im_start\|>system\n)(.+?)(<\|im_end\|>)", text, re.DOTALL) if first else None
    if not default:
        return [Segment(text, "template")] if text else []
    rest = text[default.end(2) :]
    return [Segment(default[1], "template"), Segment(default[2], "system"), Segment(rest, "template")]


def _in_order(placeholders: list[str], medias: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Images and videos in the order of the prompt's placeholders."""
    queues = {kind: iter([m for m in medias if m[0] == kind]) for kind in (IMAGE, VIDEO)}
    return [next(queues[IMAGE if pad == IMAGE_PAD else VIDEO]) for pad in placeholders]


def _media_rows(media: Sequence[Any] | None, n_rows: int, single: bool, word: str) -> list[list[Any]]:
    """The images (or videos) of each prompt."""
    if media is None:
        return [[] for _ in range(n_rows)]
    if not isinstance(media, (list, tuple)):
        raise ValueError(f"expected {word}=[…], a list, got one {type(media).__name__}: wrap it in a list.")
    if single:
        return [list(media)]
    if len(media) != n_rows or any(row is not None and not isinstance(row, (list, tuple)) for row in media):
        raise ValueError(
            f"for {n_rows} prompts expected {word}= a list of {n_rows} lists (one for each prompt, [] for none), got {len(media)} entries."
        )
    return [list(row or []) for row in media]


def _per_row(values: str | Sequence[str | None] | None, n_rows: int, word: str) -> list[str | None]:
    rows: list[str | None] = [values] if isinstance(values, str) else [None] * n_rows if values is None else list(values)
    if len(rows) != n_rows:
        raise ValueError(f"expected {n_rows} {word}, one for each prompt (None for none), got {len(rows)}.")
    if any(value is not None and not value for value in rows):
        raise ValueError(f"an empty string in {word}: use None for a prompt without one.")
    return rows


def _video(settings: dict[str, Any], where: str, images: Qwen2VLImageProcessorPil) -> dict[str, Any]:
    """The fields of `Processor` that come from a video processor's settings.

    Args:
        images: image processor whose patch sizes are used if the settings have none.
    """
    settings = {key: getattr(images, key) for key in ("patch_size", "temporal_patch_size", "merge_size")} | settings
    whole = "Qwen3VL" in str(settings.get("video_processor_type"))  # its class has other defaults
    if whole:
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | settings
    token = (images.patch_size * images.merge_size) ** 2
    videos = image_processor(settings, where, {edge: area // 28**2 * token for edge, area in VIDEO_SIZE.items()})
    budget = None
    if settings.get("cap_pixels_per_frame"):  # in Qwen3-VL the limit is per frame, in Qwen2-VL for all frames
        most = settings.get("max_video_tokens", 768 if whole else 128_000) * token
        budget = most if whole else int(most * 0.9)
    return {"video_size": dict(videos.size), "video_processor": videos, "video_budget": budget}
