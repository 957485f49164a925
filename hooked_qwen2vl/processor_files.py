"""Reads the tokenizer, the image and video settings and the chat templates of a checkpoint, in transformers' order of precedence.

    images      "image_processor" in processor_config.json, else preprocessor_config.json
    videos      "video_processor" in processor_config.json, else video_preprocessor_config.json, else preprocessor_config.json
    templates   "chat_template" in processor_config.json, else chat_template.json, else chat_template.jinja with
                additional_chat_templates/*.jinja, else the tokenizer's own

Source: `get_image_processor_dict`, `get_video_processor_dict` and `get_processor_dict` of transformers 5.24.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .files import open_regular

PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
FILES = (PROCESSOR, IMAGES, VIDEOS, TOKENIZER, VOCABULARY, "tokenizer_config.json")
Templates = str | dict[str, str] | None  # one, or several by name
IMAGE_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}  # transformers' default
VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
SETTINGS = {
    "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb",
    "patch_size", "temporal_patch_size", "merge_size",
}  # fmt: skip
_EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
_KINDS = re.compile(r"Qwen\w*VL(Image|Video)Processor(Fast|Pil)?")
_SAMPLE = "Why is 1 + 1 = 2?\n"


def has_processor(folder: Path) -> bool:
    """Whether a folder has a processor, or a part of one."""
    return any((folder / name).exists() for name in FILES)


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        ValueError: none that transformers can read, or one with an incomplete vocabulary, which would lose text.
    """
    whole = (folder / TOKENIZER).exists()
    if not whole and not ((folder / VOCABULARY).exists() and (folder / MERGES).exists()):
        raise ValueError(
            f"{folder} has no tokenizer: expected {TOKENIZER}, or {VOCABULARY} and {MERGES}; without them every text is empty."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        same = tokenizer.decode(tokenizer(_SAMPLE)["input_ids"], clean_up_tokenization_spaces=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{folder} has no tokenizer that transformers can read ({str(error)[:200]}).") from error
    if same != _SAMPLE:
        raise ValueError(
            f"the tokenizer in {folder} makes {same!r} of {_SAMPLE!r}: its vocabulary is missing or cut short; download it anew."
        )
    return tokenizer


def image_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """(settings for images, the file and key they are from).

    Raises:
        ValueError: there are no settings, or a file is not JSON.
    """
    return _nested(folder, "image_processor") or _whole(folder, IMAGES, "how images are resized and normalised")


def video_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """(settings for videos, the file and key they are from); empty settings if no file has them."""
    nested = _nested(folder, "video_processor")
    file = VIDEOS if (folder / VIDEOS).exists() else IMAGES
    if not nested and not (folder / file).exists():  # only images have settings
        return {}, str(folder)
    return nested or _whole(folder, file, "how videos are resized and normalised")


def chat_templates(folder: Path, tokenizer: Any) -> Templates:
    """The folder's chat template, or several by name; None if there is none.

    Raises:
        ValueError: a file is not JSON, or there are chat_template.json and separate templates (which transformers refuses, too).
    """
    own = (read_json(folder / PROCESSOR) or {}).get("chat_template")
    if own is not None:
        return named_templates(own, str(folder / PROCESSOR))
    jinja = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    stored = read_json(folder / "chat_template.json")
    if stored is not None:
        if jinja or not isinstance(stored.get("chat_template"), (str, dict)):
            raise ValueError(
                f"{folder / 'chat_template.json'} has no template under 'chat_template', or there are separate templates too: keep one, "
                f"as chat_template.jinja."
            )
        return stored["chat_template"]
    if (folder / "chat_template.jinja").exists():
        jinja["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if jinja:
        return jinja["default"] if list(jinja) == ["default"] else jinja
    return named_templates(getattr(tokenizer, "chat_template", None), str(folder))


def named_templates(templates: Any, where: str) -> Templates:
    """Chat templates from the forms that transformers writes: a text, a mapping, or a list of {"name", "template"}."""
    if isinstance(templates, (list, tuple)) and all(isinstance(t, Mapping) and {"name", "template"} <= set(t) for t in templates):
        templates = {t["name"]: t["template"] for t in templates}
    if templates is None or isinstance(templates, str):
        return templates
    if not isinstance(templates, Mapping) or not all(isinstance(t, str) for t in templates.values()):
        raise ValueError(f"{where} has a chat_template of type {type(templates).__name__}: expected text, or texts by name.")
    return dict(templates)


def image_processor(settings: Mapping[str, Any], where: str, size: Mapping[str, int] = IMAGE_SIZE) -> Qwen2VLImageProcessorPil:
    """The image processor with these settings.

    Args:
        where: the file, for error messages.
        size: default if the settings have no size.
    Raises:
        ValueError: settings of another kind of processor, or invalid values, which the message lists.
    """
    kinds = [settings.get(f"{half}_processor_type") for half in ("image", "video")]
    if other := [kind for kind in kinds if kind is not None and not _KINDS.fullmatch(str(kind))]:
        raise ValueError(f"{where} is for {other[0]!r}, another processor: expected Qwen2VLImageProcessor.")
    given = {key: value for key, value in settings.items() if key in SETTINGS and value is not None}
    problems = [f"{key} = {str(value)[:80]}" for key, value in given.items() if not _is_usable(key, value)]
    if problems:
        raise ValueError(
            f"{where} has {', '.join(problems)}: expected finite numbers (an image_std above 0 to divide by, three for the three "
            f"channels), whole sides above 0, and true or false for do_…."
        )
    return Qwen2VLImageProcessorPil(**given, size=_size(settings, where, size))


def _size(settings: Mapping[str, Any], where: str, default: Mapping[str, int]) -> dict[str, int]:
    """{"shortest_edge", "longest_edge"}, areas in pixels; `min_pixels` and `max_pixels` have precedence, as in transformers."""
    size = settings.get("size")
    size = default if size is None else size
    known = {*_EDGES, *_EDGES.values()}
    if not isinstance(size, Mapping) or not set(size) <= known:
        raise ValueError(f"{where} has size = {str(size)[:80]}: expected {{'shortest_edge': …, 'longest_edge': …}}, areas in pixels.")
    found: dict[str, Any] = {edge: size.get(edge) if settings.get(older) is None else settings[older] for edge, older in _EDGES.items()}
    wrong = [f"{edge} ({older}) = {str(found[edge])[:40]}" for edge, older in _EDGES.items() if not _is_count(found[edge])]
    if wrong:
        raise ValueError(f"{where} has the size {', '.join(wrong)}: expected whole numbers above 0, areas in pixels.")
    if found["shortest_edge"] > found["longest_edge"]:
        raise ValueError(
            f"{where} has a size whose shortest_edge {found['shortest_edge']} is more than its longest_edge {found['longest_edge']}."
        )
    return found


def _is_usable(key: str, value: Any) -> bool:
    if key.startswith("do_"):
        return isinstance(value, bool)
    if key in ("image_mean", "image_std"):
        values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
        least = 0 if key == "image_std" else -np.inf
        return len(values) == 3 and all(_is_number(v) and v > least for v in values)
    return _is_number(value) if key in ("rescale_factor", "resample") else _is_count(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(value))  # pyright: ignore[reportArgumentType, reportCallIssue] (a real number is one of numpy's)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _nested(folder: Path, key: str) -> tuple[dict[str, Any], str] | None:
    settings = (read_json(folder / PROCESSOR) or {}).get(key)
    if settings is None:
        return None
    where = f"{folder / PROCESSOR} ({key})"
    if not isinstance(settings, dict):
        raise ValueError(f"{where} is no JSON object.")
    return settings, where


def _whole(folder: Path, file: str, what: str) -> tuple[dict[str, Any], str]:
    settings = read_json(folder / file)
    if settings is None:
        raise ValueError(f"{folder} has no {file}, and no {PROCESSOR} that has its settings ({what}).")
    return settings, str(folder / file)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file. ValueError if it is not a JSON object."""
    if not path.exists():
        return None
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    except (RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'brackets are nested too deep'}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return content
