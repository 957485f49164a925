"""Qwen's message format: encoded images, its own keys for sizes, frames as paths; and Inputs that are copied and stored."""

from __future__ import annotations

import base64
import copy
import io
import math
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import picture
from PIL import Image
from transformers.image_utils import load_image

from hooked_qwen2vl import Inputs
from hooked_qwen2vl.pictures import MAX_ENCODED

WIDE = picture(140, 84, 1)


def encoded(image: Image.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


def user(*content: dict) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def image(content, **keys) -> dict:
    return {"type": "image", "image": content, **keys}


TEXT = {"type": "text", "text": "what?"}


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image;base64,", ""])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_encoded_images_are_transformers(head, format, model):
    text = head + encoded(WIDE, format)
    theirs = load_image(text) if head != "data:image;base64," else load_image(encoded(WIDE, format))
    ours = model.to_inputs("what?", images=[text])
    assert ours == model.to_inputs("what?", images=[theirs])
    assert model.to_inputs(messages=user(image(text), TEXT)) == ours


@pytest.mark.parametrize(
    "text, message",
    [
        ("data:text/plain;base64,aGVsbG8=", "not an image as a data URI"),
        ("data:image/png," + "x" * 5000, "not an image as a data URI"),
        ("data:image/png;base64," + "!" * 5000, "is not base64"),
        ("data:image/png;base64," + base64.b64encode(b"hello " * 9999).decode(), "not a readable image"),
        (base64.b64encode(b"hello " * 9999).decode(), "not a readable image"),
        ("A" * (MAX_ENCODED + 1), "is longer than"),
        ("nowhere/" * 5000, "there is no image at|not a readable image"),
        ("https://example.org/" + "a" * 5000, "is a web address"),
    ],
    ids=["text", "not encoded", "not base64", "no image", "no image, bare", "too long", "path", "address"],
)
def test_what_is_no_encoded_image_is_said_briefly(text, message, model):
    for given in ({"images": [text], "prompt": "what?"}, {"messages": user(image(text), TEXT)}):
        with pytest.raises(ValueError, match=message) as error:
            model.to_inputs(**given)
        assert len(str(error.value)) < 700 and (len(text) < 200 or text[:201] not in str(error.value))


LONG = "x" * 1_400_000


@pytest.mark.parametrize(
    "arguments",
    [
        {"messages": user({"type": LONG})},
        {"messages": user({"type": "text", "text": [LONG]})},
        {"messages": user({"type": "text", "text": "a", LONG: 1})},
        {"messages": [{"role": LONG, "content": "a"}, {"role": "user", "content": "a"}]},
        {"messages": [LONG]},
        {"messages": {"content": LONG}},
        {"prompt": {LONG: 1}},
        {"prompt": "a", "template": LONG},
        {"prompt": "a", "images": [WIDE], "min_pixels": LONG},
        {"messages": user(image(WIDE, min_pixels=LONG), TEXT)},
    ],
)
def test_no_error_repeats_all_that_came(arguments, model):
    with pytest.raises(ValueError) as error:
        model.to_inputs(**arguments)
    assert len(str(error.value)) < 700


# ---- Qwen's own keys --------------------------------------------------------------------------


def smart_resize(height: int, width: int, low: int = 4 * 784, high: int = 16384 * 784) -> tuple[int, int]:
    """As published in qwen_vl_utils 0.0.8 (vision_process.py), with its IMAGE_FACTOR of 28."""
    h, w = max(28, round(height / 28) * 28), max(28, round(width / 28) * 28)
    if h * w > high:
        beta = math.sqrt(height * width / high)
        h, w = math.floor(height / beta / 28) * 28, math.floor(width / beta / 28) * 28
    elif h * w < low:
        beta = math.sqrt(low / (height * width))
        h, w = math.ceil(height * beta / 28) * 28, math.ceil(width * beta / 28) * 28
    return h, w


@pytest.mark.parametrize(
    "keys, size",
    [
        ({"min_pixels": 30 * 784}, smart_resize(84, 140, low=30 * 784)),
        ({"max_pixels": 6 * 784}, smart_resize(84, 140, high=6 * 784)),
        ({"min_pixels": 784, "max_pixels": 4 * 784}, smart_resize(84, 140, 784, 4 * 784)),
        ({"resized_height": 60, "resized_width": 200}, smart_resize(60, 200)),
    ],
)
def test_sizes_of_a_message_are_qwens(keys, size, model):
    """The picture is resized as fetch_image does, and then goes through the processor; boxes stay in original pixels."""
    ours = model.to_inputs(messages=user(image(WIDE, **keys), TEXT))
    by_hand = WIDE.convert("RGB").resize(size[::-1])
    theirs = model.to_inputs("what?", images=[by_hand])
    assert torch.equal(ours.pixels, theirs.pixels) and ours.grid() == theirs.grid() == (size[0] // 28, size[1] // 28)
    assert ours.grid() != model.to_inputs("what?", images=[WIDE]).grid()
    assert ours.boxes()[-1].tolist()[2:] == pytest.approx([140, 84])


def test_a_video_of_frame_paths_with_fps(model, tmp_path):
    frames = [picture(84, 56, 20 + n) for n in range(3)]
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for frame, path in zip(frames, paths):
        frame.save(path)
    said = {"type": "video", "video": [f"file://{path}" for path in paths], "fps": 2.0}
    assert model.to_inputs(messages=user(said, TEXT)) == model.to_inputs("what?", videos=[frames])
    small = model.to_inputs(messages=user({**said, "resized_height": 56, "resized_width": 56}, TEXT))
    by_hand = model.to_inputs("what?", videos=[[frame.resize((56, 56)) for frame in frames]])
    assert torch.equal(small.pixels, by_hand.pixels) and small.grid(video=0) == (2, 2)


@pytest.mark.parametrize(
    "part, message",
    [
        (image(WIDE, detail="high"), r"\['detail'\], which would have no effect: expected 'type', 'image', 'min_pixels'"),
        (image(WIDE, fps=2), r"\['fps'\]"),
        ({"type": "video", "video": [WIDE] * 2, "nframes": 2}, r"\['nframes'\]"),
        ({"type": "video", "video": [WIDE] * 2, "fps": -1}, "fps of the video is -1"),
        (image(WIDE, resized_height=28), "only one of resized_height and resized_width"),
        (image(WIDE, min_pixels=10**6, max_pixels=784), "more than max_pixels"),
        (image(WIDE, max_pixels=0), "max_pixels of the image is 0"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "expected a 'type' of"),
        ({"type": "video", "video": "clip.mp4", "fps": 1}, "list of frames"),
    ],
)
def test_other_keys_are_refused_by_name(part, message, model):
    with pytest.raises(ValueError, match=message):
        model.to_inputs(messages=user(part, TEXT))


def test_images_without_a_question(model):
    """As transformers renders them: the image alone in the user's turn."""
    ours = model.to_inputs(messages=user(image(WIDE)))
    assert ours.segment_names() == ["template", "system", "vision_start", "image[0]", "vision_end"]
    text = model.tokenizer.apply_chat_template(user(image("x")), tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 15)
    assert ours.tokens[0].tolist() == model.tokenizer(text)["input_ids"]
    assert model.to_inputs("", images=[WIDE]).tokens.tolist() == ours.tokens.tolist()
    assert model.to_inputs(["", "a"], images=[[WIDE], []]).shape[0] == 2


# ---- copies -----------------------------------------------------------------------------------


STATES = ["fresh", "text", "encoded", "encoded, with a graph", "a row", "rows again", "extended", "left padded", "on a device", "video"]


def states(model) -> dict[str, Inputs]:
    batch = model.to_inputs(["what?", "which of them?"], images=[[WIDE], [WIDE, picture(56, 56)]], answers=["red", None])
    with torch.enable_grad():
        graph = model.encode(batch)
    with torch.no_grad():
        plain = model.encode(batch)
    return {
        "fresh": batch,
        "text": model.to_inputs("what?"),
        "encoded": plain,
        "encoded, with a graph": graph,
        "a row": plain[1],
        "rows again": plain.repeat(2),
        "extended": plain.extend(torch.tensor([5, 6]), torch.tensor([True, False])),
        "left padded": plain.left_padded(),
        "on a device": plain.to("cpu"),
        "video": model.to_inputs("what?", videos=[[WIDE] * 2]),
    }


def pickled(inputs: Inputs) -> Inputs:
    return pickle.loads(pickle.dumps(inputs))


def saved(inputs: Inputs) -> Inputs:
    buffer = io.BytesIO()
    torch.save({"inputs": inputs}, buffer)
    buffer.seek(0)
    return torch.load(buffer)["inputs"]  # weights_only, torch's default


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled, saved], ids=["copy", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("state", STATES)
def test_copies_are_equal_and_encoded_as_they_were(state, way, model):
    inputs = states(model)[state]
    other = way(inputs)
    assert other == inputs and other.segment_names() == inputs.segment_names()
    assert model.is_encoded(other) == model.is_encoded(inputs) == (state not in ("fresh", "text", "video"))
    with torch.no_grad():
        assert (model(other) - model(inputs)).abs().max() < 1e-5
    if way is not copy.copy and inputs.pixels is not None:
        with torch.no_grad():
            other.pixels.add_(1.0)
        assert other != inputs  # no storage is shared


# ---- templates that read the texts --------------------------------------------------------------------

# As the thinking models' template does it: a turn to come opens a thought, a last answer is shown with its thought, and the
# thoughts of earlier answers are left out.
THINKING = """{% for message in messages %}{% set said = message.content %}{{ '<|im_start|>' + message.role + '\\n' }}\
{% if said is not string %}{% for part in said %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}{% endfor %}{% elif message.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in said %}\
{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% set said = said.split('</think>')[-1].lstrip('\\n') %}\
{% endif %}{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}{% else %}{{ said }}{% endif %}\
{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""


@pytest.fixture
def thinking(model):
    return replace(model.processor, chat_template=THINKING)


def turns(*said: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]


@pytest.mark.parametrize("said", [("what?",), ("what?", "red"), ("what?", "red", "and now?"), ("what?", "red", "and now?", "blue")])
def test_a_template_that_thinks(said, thinking, model):
    """Texts and tokens are the tokenizer's own rendering; the thought that is opened belongs to the template."""
    ours = thinking.to_inputs(model.cfg, messages=turns(*said))
    final = len(said) % 2 == 0
    theirs = thinking.tokenizer.apply_chat_template(
        turns(*said), chat_template=THINKING, tokenize=False, add_generation_prompt=not final, continue_final_message=final
    )
    assert thinking.tokenizer.decode(ours.tokens[0]) == theirs
    assert ours.segments[0][-1] == ("answer" if final else "template")
    assert ("answer" in ours.segments[0]) == final and theirs.count("<think>") == 1


def test_thoughts_that_the_template_takes_out(thinking, model):
    with pytest.raises(ValueError, match=r"changes a text of the conversation.*</think>"):
        thinking.to_inputs(model.cfg, messages=turns("what?", "<think>\nlong\n</think>\n\nred", "and now?"))
    trims = replace(model.processor, chat_template=model.processor.chat_template.replace("content['text']", "content['text'] | trim"))
    with pytest.raises(ValueError, match="' red '|red"):
        trims.to_inputs(model.cfg, messages=user({"type": "text", "text": "is it red? "}))
    assert trims.to_inputs(model.cfg, messages=user(TEXT)) == model.to_inputs(messages=user(TEXT))


def test_an_answer_inside_a_thought_is_said(thinking, model):
    with pytest.warns(UserWarning, match="opens a thought.*'red'"):
        inside = thinking.to_inputs(model.cfg, "what?", answers="red")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = thinking.to_inputs(model.cfg, "what?", answers="</think>\n\nred")
        thinking.to_inputs(model.cfg, "what?")
        model.to_inputs("what?", answers="red")
    text = thinking.tokenizer.decode(after.tokens[0])
    assert text.endswith("<think>\n</think>\n\nred") and after.shape[1] > inside.shape[1]
