"""A folder's tokenizer, settings and templates: as transformers reads the same files, or refused with the file's name."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from conftest import picture
from tiny import CHAT_TEMPLATE, tiny_processor
from tiny_processor import reference_processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.video_processing_utils import BaseVideoProcessor

from hooked_qwen2vl import Processor

WIDE = picture(140, 84, 1)
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.25, 0.2]


def size(shortest: int, longest: int) -> dict:
    return {"shortest_edge": shortest * 784, "longest_edge": longest * 784}


# What each file says, when it is there: all different, so that the one that is read shows.
FILES = {
    "nested images": ("processor_config.json", {"image_processor": {"size": size(1, 3), "image_mean": MEAN}}),
    "nested videos": ("processor_config.json", {"video_processor": {"size": size(1, 4), "image_std": STD, "do_sample_frames": False}}),
    "images": ("preprocessor_config.json", {"min_pixels": 784, "max_pixels": 5 * 784, "image_processor_type": "Qwen2VLImageProcessor"}),
    "videos": ("video_preprocessor_config.json", {"size": size(1, 6), "image_mean": MEAN, "video_processor_type": "Qwen2VLVideoProcessor"}),
}
TEMPLATES = {
    "nested template": ("processor_config.json", {"chat_template": "A" + CHAT_TEMPLATE}),
    "json template": ("chat_template.json", {"chat_template": "B" + CHAT_TEMPLATE}),
    "jinja template": ("chat_template.jinja", "C" + CHAT_TEMPLATE),
    "tokenizer's template": ("tokenizer_config.json", {"chat_template": "D" + CHAT_TEMPLATE}),
}


def write(folder, tokenizer, parts) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    content: dict = {}
    for name, value in parts:
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    for name, value in content.items():
        if name == "tokenizer_config.json":
            value = json.loads((folder / name).read_text()) | value
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def combinations(parts: dict):
    return [tuple(name for name, there in zip(parts, chosen) if there) for chosen in product((True, False), repeat=len(parts))]


@pytest.mark.parametrize("chosen", combinations(FILES), ids=" + ".join)
def test_image_and_video_settings_come_from_transformers_files(chosen, tmp_path, processor):
    write(tmp_path, processor.tokenizer, [FILES[name] for name in chosen])
    try:
        theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    except OSError:
        with pytest.raises(ValueError, match="no preprocessor_config.json, and no processor_config.json"):
            Processor.from_folder(tmp_path)
        return
    ours = Processor.from_folder(tmp_path)
    ours_, theirs_ = (p(images=[WIDE], return_tensors="pt") for p in (ours.image_processor, theirs))
    assert torch.equal(ours_["pixel_values"], theirs_["pixel_values"])
    try:
        settings = BaseVideoProcessor.get_video_processor_dict(tmp_path)[0]
    except OSError:  # transformers reads no videos here
        return
    defaults = {"shortest_edge": 128 * 784, "longest_edge": 768 * 784}
    edges = settings.get("size") or {"shortest_edge": settings.get("min_pixels"), "longest_edge": settings.get("max_pixels")}
    assert ours.video_size == {edge: edges.get(edge) or defaults[edge] for edge in defaults}
    assert list(ours.video_processor.image_mean) == list(settings.get("image_mean") or theirs.__class__.image_mean)
    assert list(ours.video_processor.image_std) == list(settings.get("image_std") or theirs.__class__.image_std)


@pytest.mark.parametrize("chosen", combinations(TEMPLATES), ids=" + ".join)
def test_the_chat_template_is_transformers(chosen, tmp_path, processor):
    write(tmp_path, processor.tokenizer, [FILES["images"], *(TEMPLATES[name] for name in chosen)])
    theirs = Qwen2VLProcessor.get_processor_dict(tmp_path)[0].get("chat_template")
    tokenizers = "D" + CHAT_TEMPLATE if "tokenizer's template" in chosen else None
    assert Processor.from_folder(tmp_path).chat_template == (theirs or tokenizers)


def test_what_transformers_5_saves(tmp_path, processor, model, cfg):
    """One processor_config.json with everything nested, a template in a file of its own."""
    reference = reference_processor(processor)
    processor.tokenizer.save_pretrained(tmp_path)
    nested = {"image_processor": reference.image_processor.to_dict(), "video_processor": {"size": size(1, 8), "image_mean": MEAN}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor", **nested}))
    loaded = Processor.from_folder(tmp_path)
    ours = loaded.to_inputs(cfg, "what?", images=[WIDE])
    theirs = reference.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "what?"}]}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    assert torch.equal(ours.tokens, theirs["input_ids"]) and torch.equal(ours.pixels, theirs["pixel_values"])


@pytest.fixture(scope="module")
def cfg(model):
    return model.cfg


def test_a_video_is_normalised_by_its_own_settings(tmp_path, processor, cfg):
    video = {"size": size(1, 64), "image_mean": MEAN, "image_std": STD}
    write(tmp_path, processor.tokenizer, [("preprocessor_config.json", {"size": size(1, 64)}), ("video_preprocessor_config.json", video)])
    frames = [picture(84, 56, 20 + n) for n in range(2)]
    ours = Processor.from_folder(tmp_path).to_inputs(cfg, "?", videos=[frames], template=False).pixels
    raw = np.stack([np.asarray(frame, dtype=np.float64) / 255 for frame in frames])  # (t, h, w, c); no resizing is needed
    values = ((raw - MEAN) / STD).transpose(3, 0, 1, 2).reshape(3, 2, 2, 2, 14, 3, 2, 14)  # c t rows r y cols s x
    expected = values.transpose(2, 5, 3, 6, 0, 1, 4, 7).reshape(24, -1)
    assert np.abs(ours.numpy() - expected).max() < 1e-5
    still = Processor.from_folder(tmp_path).to_inputs(cfg, "?", images=[frames[0]], template=False).pixels
    assert np.abs(still.numpy()[:, :196] - expected[:, :196]).max() > 0.5


def test_a_cap_on_a_videos_pixels(tmp_path, processor, cfg):
    """transformers' `cap_pixels_per_frame`: an even share of 90 % of max_video_tokens, in pixels."""
    video = {"size": size(1, 64), "cap_pixels_per_frame": True, "max_video_tokens": 20}
    write(tmp_path, processor.tokenizer, [FILES["images"], ("video_preprocessor_config.json", video)])
    loaded = Processor.from_folder(tmp_path)
    for n in (2, 4):  # 20 · 0.9 · 2 / n tokens a frame
        rows, cols = loaded.to_inputs(cfg, "?", videos=[[picture(140, 140, 1)] * n], template=False).grid(video=0)
        assert (rows, cols) == ((4, 4) if n == 2 else (3, 3))


def test_bounds_that_leave_no_room(model):
    processor = tiny_processor()
    processor.video_size = size(10, 20)
    with pytest.raises(ValueError, match=r"a video's frame would have at least 7840 pixels \(min_pixels\) and at most 3920"):
        processor.to_inputs(model.cfg, "?", videos=[[WIDE]], max_pixels=5 * 784)
    assert processor.to_inputs(model.cfg, "?", videos=[[WIDE]], min_pixels=784, max_pixels=5 * 784).grid(video=0) == (1, 2)
    with pytest.raises(ValueError, match="an image would have at least 78400"):
        processor.to_inputs(model.cfg, "?", images=[WIDE], min_pixels=100 * 784)


class WithVideos:
    """Transformers' processor where torchvision is there, as far as it is read."""

    def __init__(self, processor: Processor, video: dict):
        self.image_processor, self.tokenizer, self.chat_template = processor.image_processor, processor.tokenizer, CHAT_TEMPLATE
        self.video_processor = Qwen2VLImageProcessorPil(**video)  # a video processor's to_dict has these settings


def test_a_video_processor_in_memory(processor):
    taken = Processor.from_hf(WithVideos(processor, {"size": size(1, 9), "image_mean": MEAN}))
    assert taken.video_size == size(1, 9) and list(taken.video_processor.image_mean) == MEAN
    assert list(taken.image_processor.image_mean) != MEAN


# ---- several templates ------------------------------------------------------------------------

TERSE = CHAT_TEMPLATE.replace("You are a helpful assistant.", "Be terse.")
NAMED = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "terse", "template": TERSE}]


@pytest.mark.parametrize("place", ["processor_config.json", "tokenizer_config.json", "files"])
def test_several_templates_by_name(place, tmp_path, processor, cfg):
    parts = [FILES["images"]]
    if place == "files":
        parts.append(("chat_template.jinja", NAMED[0]["template"]))
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "terse.jinja").write_text(NAMED[1]["template"])
    else:
        parts.append((place, {"chat_template": NAMED}))
    write(tmp_path, processor.tokenizer, parts)
    loaded = Processor.from_folder(tmp_path)
    said = [loaded.to_inputs(cfg, "what?", template=template) for template in (True, "terse")]
    assert [loaded.tokenizer.decode(inputs.tokens[0, inputs.span("system")]) for inputs in said] == [
        "You are a helpful assistant.",
        "Be terse.",
    ]
    with pytest.raises(ValueError, match="no chat template 'long': pass template= one of 'default', 'terse'"):
        loaded.to_inputs(cfg, "what?", template="long")
    with pytest.raises(ValueError, match="no chat template 'terse'"):
        processor.to_inputs(cfg, "what?", template="terse")


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no vocabulary", "no merges", "cut short", "empty vocabulary"])
def test_a_tokenizer_without_words_is_refused(damage, tmp_path, processor):
    write(tmp_path, processor.tokenizer, [FILES["images"], TEMPLATES["jinja template"]])
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    if damage == "cut short":
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole)[:500])
    elif damage == "empty vocabulary":
        whole["model"] |= {"vocab": {}, "merges": []}
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    else:
        (tmp_path / "tokenizer.json").unlink()
        if damage == "no merges":
            (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    with pytest.raises(ValueError, match=f"{tmp_path}.*(no tokenizer|download it anew)"):
        Processor.from_folder(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": {"height": 5, "width": 6}}, r"size = \{'height': 5, 'width': 6\}"),
        ({"size": 224}, "size = 224"),
        ({"size": "large"}, "size = large"),
        ({"size": {"shortest_edge": 784}}, r"longest_edge \(max_pixels\) = None"),
        ({"size": {"shortest_edge": "a", "longest_edge": 784}}, r"shortest_edge \(min_pixels\) = a"),
        ({"size": size(4, 2)}, "shortest_edge 3136 is more than its longest_edge 1568"),
        ({"max_pixels": -1}, r"longest_edge \(max_pixels\) = -1"),
        ({"max_pixels": 1e6}, r"longest_edge \(max_pixels\) = 1000000.0"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std = \[0.2, 0.0, 0.2\]"),
        ({"image_mean": "grey"}, "image_mean = grey"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean = \[0.5, 0.5\]"),
        ({"patch_size": 0}, "patch_size = 0"),
        ({"do_resize": "yes"}, "do_resize = yes"),
        ({"rescale_factor": float("nan")}, "rescale_factor = nan"),
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor', another processor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_malformed_settings_are_named_with_their_file(settings, message, file, tmp_path, processor):
    content = settings if file == "preprocessor_config.json" else {"image_processor": settings}
    write(tmp_path, processor.tokenizer, [(file, content), TEMPLATES["jinja template"]])
    with pytest.raises(ValueError, match=f"{tmp_path / file}.*{message}"):
        Processor.from_folder(tmp_path)


def test_a_legacy_template_beside_separate_ones_is_refused_as_in_transformers(tmp_path, processor):
    write(tmp_path, processor.tokenizer, [FILES["images"], TEMPLATES["json template"]])
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "terse.jinja").write_text("x")
    with pytest.raises(ValueError, match="conflicting"):
        Qwen2VLProcessor.get_processor_dict(tmp_path)
    with pytest.raises(ValueError, match=r"chat_template.json.*keep one"):
        Processor.from_folder(tmp_path)
