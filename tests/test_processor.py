"""Prompts, chats, images and videos against transformers' own processor, and refusals."""

from __future__ import annotations

import json
from copy import copy

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from tiny import CHAT_TEMPLATE, tiny_processor
from tiny_processor import reference_processor

from hooked_qwen2vl import Inputs, Processor
from hooked_qwen2vl.processor import open_image
from hooked_qwen2vl.processor_files import VIDEO_SIZE

WIDE, TALL = picture(140, 84, 1), picture(60, 115, 2)


@pytest.fixture(scope="module")
def reference(processor):
    return reference_processor(processor)


@pytest.fixture(scope="module")
def cfg(model):
    """The tiny model's numbers with a context for the longest prompt here."""
    roomy = copy(model.cfg)
    roomy.n_ctx = 4096
    return roomy


def image(im: Image.Image) -> dict:
    return {"type": "image", "image": im}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*content: dict | str) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(words: str) -> dict:
    return {"role": "assistant", "content": words}


CHATS = {
    "one image": [user(image(WIDE), text("what is red?"))],
    "text only": [user("what is red?")],
    "text, then image": [user(text("what is this: "), image(TALL))],
    "image between": [user(text("before "), image(TALL), text(" between "), image(WIDE), text(" after"))],
    "system": [{"role": "system", "content": "Be  brief.\n"}, user(image(WIDE), text("what?"))],
    "system in parts": [{"role": "system", "content": [text("Be "), text("brief.")]}, user("what?")],
    "several turns": [user(image(WIDE), text("what?")), assistant("red"), user(image(TALL), text("and this?"))],
    "words of the template": [user("user\nassistant <|im_end|> system")],
    "scripts": [user(image(WIDE), text("ein scho\u0308nes 图 🙂‍↔️  \n\n\n naïve\ttabs "))],
}
ANSWERED = {
    "answered": [user(image(WIDE), text("what is red?")), assistant("the blue thing is red")],
    "answered twice": [user("a?"), assistant("b"), user(image(TALL), text("c?")), assistant(" d e ")],
}


def same(ours: Inputs, theirs: dict) -> None:
    assert torch.equal(ours.tokens, theirs["input_ids"])
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    assert torch.equal(ours.token_types, theirs["mm_token_type_ids"].long())
    if ours.visuals:
        assert torch.equal(ours.pixels, theirs["pixel_values"])
        assert torch.equal(ours.image_grids, theirs["image_grid_thw"])
    else:
        assert ours.pixels is None and "pixel_values" not in theirs


def sizes(messages: list[dict]) -> list[tuple[int, int]]:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [part["image"].size for part in parts if part["type"] == "image"]


@pytest.mark.parametrize("case", CHATS | ANSWERED)
def test_a_chat_equals_the_references(case, model, reference):
    """Ids, types, mask, pixels and grids; and read back from the reference's batch, the same Inputs, parts and all."""
    messages = (CHATS | ANSWERED)[case]
    ours = model.to_inputs(messages=messages, special_tokens=True)
    final = {"continue_final_message": True} if case in ANSWERED else {"add_generation_prompt": True}
    theirs = reference.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **final)
    same(ours, theirs)
    again = Inputs.from_processor(theirs, model.cfg, image_sizes=sizes(messages))
    if case == "words of the template":  # an end token inside the question: not a chat by its shape
        assert set(again.segment_names()) == {"question"}
    else:
        assert again == ours


def test_a_batch_equals_the_references(model, reference):
    questions = ["what?", "which of the two is red?", "no image"]
    images = [[WIDE], [TALL, WIDE], []]
    ours = model.to_inputs(questions, images=images)
    chats = [[user(*map(image, row), text(question))] for question, row in zip(questions, images)]
    rendered = [reference.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    same(ours, reference(text=rendered, images=images, padding=True, return_tensors="pt"))
    assert model.to_inputs(messages=chats) == ours
    assert ours.attention_mask[:, -1].all() and not ours.attention_mask[2, 0]  # padded on the left


def test_parts_are_what_was_said(model):
    inputs = model.to_inputs(messages=ANSWERED["answered twice"])

    def said(name: str) -> str:
        return model.to_string(inputs.tokens[0, inputs.positions(name)])

    assert said("question") == "c?" and said("answer") == " d e "
    assert said("history") == "a?b"
    assert said("system") == "You are a helpful assistant."
    template = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert said("template") == template + "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    own = model.to_inputs("what?", system="Be brief.")
    assert model.to_string(own.tokens[0, own.span("system")]) == "Be brief."


# ---- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("answer", ["red", " red", "ed", "\n\nred", "blue 🙂", "<|im_end|>"])
def test_an_answer_leaves_its_prompt_alone(answer, template, model):
    """'the cat is r' + 'ed' would be ' red', one token, were they tokenised together."""
    prompt = "the cat is r"
    alone = model.to_inputs(prompt, images=[WIDE], template=template)
    forced = model.to_inputs(prompt, images=[WIDE], template=template, answers=answer)
    n = alone.shape[1]
    assert torch.equal(forced.tokens[:, :n], alone.tokens)
    assert forced.span("answer") == slice(n, forced.shape[1])
    assert forced.tokens[0, n:].tolist() == model.tokenizer(answer, split_special_tokens=True)["input_ids"]
    assert forced.positions("last").tolist() == alone.positions("last").tolist() == [n - 1]
    assert torch.equal(forced.labels[0, n:], forced.tokens[0, n:]) and (forced.labels[0, :n] == -100).all()
    assert alone.labels is None


def test_an_answer_beside_messages(model):
    asked = [user(image(WIDE), text("what?"))]
    assert model.to_inputs(messages=asked, answers="red") == model.to_inputs(messages=[*asked, assistant("red")])


# ---- images -----------------------------------------------------------------------------------


def noise(bands: int) -> np.ndarray:
    return np.random.default_rng(bands).integers(0, 256, (84, 140, bands), dtype=np.uint8)


def palette() -> Image.Image:
    paletted = WIDE.quantize(16)
    paletted.info["transparency"] = 3
    return paletted


MODES = {
    "RGB": WIDE,
    "RGBA": Image.fromarray(noise(4), "RGBA"),
    "LA": Image.fromarray(noise(2), "LA"),
    "P": palette(),
    "L": WIDE.convert("L"),
    "1": WIDE.convert("1"),
    "CMYK": WIDE.convert("CMYK"),
    "YCbCr": WIDE.convert("YCbCr"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_the_references(mode, model, reference):
    theirs = reference.image_processor(images=[MODES[mode]], return_tensors="pt")
    ours = model.to_inputs("what?", images=[MODES[mode]])
    assert torch.equal(ours.pixels, theirs["pixel_values"])
    if mode in ("RGBA", "LA"):  # transparency is seen
        opaque = model.to_inputs("what?", images=[MODES[mode].convert("RGB")])
        assert not torch.equal(ours.pixels, opaque.pixels)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_file_is_turned_upright_as_the_reference_turns_it(orientation, model, reference, tmp_path):
    path = tmp_path / "photograph.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    WIDE.save(path, exif=exif)
    theirs = reference.image_processor(images=[str(path)], return_tensors="pt")
    for given in (path, str(path), f"file://{path}"):
        ours = model.to_inputs("what?", images=[given])
        assert torch.equal(ours.pixels, theirs["pixel_values"])
        assert torch.equal(ours.image_grids, theirs["image_grid_thw"])
        assert ours.grid() == ((5, 3) if orientation in (6, 8) else (3, 5))
        x1, y1 = ours.boxes()[-1, 2:].tolist()
        assert (x1, y1) == pytest.approx((84, 140) if orientation in (6, 8) else (140, 84))


def test_a_file_with_transparency_is_the_references(model, reference, tmp_path):
    path = tmp_path / "clear.png"
    MODES["RGBA"].save(path)
    theirs = reference.image_processor(images=[str(path)], return_tensors="pt")
    assert torch.equal(model.to_inputs("what?", images=[path]).pixels, theirs["pixel_values"])


@pytest.mark.parametrize(
    "given",
    [
        np.asarray(WIDE),
        np.asarray(WIDE).transpose(2, 0, 1),
        torch.tensor(np.asarray(WIDE)),
        torch.tensor(np.asarray(WIDE)).permute(2, 0, 1),
        np.asfortranarray(np.asarray(WIDE)),
    ],
)
def test_arrays_are_pictures(given, model):
    assert model.to_inputs("what?", images=[given]) == model.to_inputs("what?", images=[WIDE])
    assert open_image(given).size == (140, 84)  # (width, height)


@pytest.mark.parametrize("bounds", [{"max_pixels": 4 * 784}, {"min_pixels": 40 * 784}, {"min_pixels": 784, "max_pixels": 784}])
def test_pixel_bounds_are_the_references(bounds, model, cfg, reference):
    size = {
        "shortest_edge": bounds.get("min_pixels", reference.image_processor.size["shortest_edge"]),
        "longest_edge": bounds.get("max_pixels", reference.image_processor.size["longest_edge"]),
    }
    theirs = reference.image_processor(images=[WIDE], size=size, return_tensors="pt")
    ours = model.processor.to_inputs(cfg, "what?", images=[WIDE], **bounds)
    assert torch.equal(ours.pixels, theirs["pixel_values"])
    rows, cols = ours.grid()
    assert bounds.get("min_pixels", 0) <= rows * cols * 784 <= bounds.get("max_pixels", 10**9)
    assert ours.grid() != model.to_inputs("what?", images=[WIDE]).grid()
    assert ours.boxes()[-1].tolist()[2:] == pytest.approx([140, 84])


# ---- videos -----------------------------------------------------------------------------------


def frames(n: int, width: int = 84, height: int = 56) -> list[Image.Image]:
    return [picture(width, height, 20 + i) for i in range(n)]


def test_a_still_video_is_its_picture(model):
    still = model.to_inputs("what?", images=[WIDE])
    video = model.to_inputs("what?", videos=[[WIDE] * 4])
    assert video.video_grids.tolist() == [[2, *still.image_grids[0, 1:].tolist()]]
    assert torch.equal(video.pixels, still.pixels.repeat(2, 1))


def test_a_last_odd_frame_is_repeated_and_order_matters(model):
    odd, even = frames(3), [*frames(3), frames(3)[-1]]
    assert torch.equal(model.to_inputs("?", videos=[odd]).pixels, model.to_inputs("?", videos=[even]).pixels)
    assert not torch.equal(model.to_inputs("?", videos=[odd[::-1]]).pixels, model.to_inputs("?", videos=[odd]).pixels)
    single = model.to_inputs("?", videos=[odd[:1]])
    assert single.video_grids[0, 0] == 1


@pytest.mark.parametrize("kind", ["array", "tensor", "channels first"])
def test_a_video_may_be_an_array(kind, model):
    array = np.stack([np.asarray(frame) for frame in frames(3)])
    given = {"array": array, "tensor": torch.tensor(array), "channels first": array.transpose(0, 3, 1, 2)}[kind]
    assert model.to_inputs("?", videos=[given]) == model.to_inputs("?", videos=[frames(3)])


def test_video_frames_have_bounds_of_their_own(cfg):
    processor = tiny_processor()
    processor.video_size = {"shortest_edge": 784, "longest_edge": 2 * 784}
    inputs = processor.to_inputs(cfg, "?", images=[WIDE], videos=[[WIDE]])
    assert inputs.grid() == (3, 5) and inputs.grid(video=0) == (1, 1)
    assert processor.to_inputs(cfg, "?", videos=[[WIDE]], max_pixels=15 * 784).grid(video=0) == (3, 5)


# ---- placeholders -----------------------------------------------------------------------------


def test_placeholders_in_the_text_say_where_images_go(model):
    framed = "<|vision_start|><|image_pad|><|vision_end|>"
    ours = model.to_inputs(f"first {framed} then {framed} ?", images=[WIDE, TALL], special_tokens=True)
    parts = [text("first "), image(WIDE), text(" then "), image(TALL), text(" ?")]
    theirs = model.to_inputs(messages=[user(*parts)])
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.pixels, theirs.pixels)
    assert ours == theirs


def test_images_and_videos_take_turns_as_the_text_says(model):
    pads = "<|video_pad|> <|image_pad|> <|video_pad|>"
    inputs = model.to_inputs(pads, images=[WIDE], videos=[frames(2), frames(4)], template=False, special_tokens=True)
    assert [visual.kind for visual in inputs.visuals] == [2, 1, 2]
    assert inputs.segment_names() == ["video[0]", "question", "image[0]", "video[1]"]
    assert torch.equal(inputs.pixels[24:84], model.to_inputs("?", images=[WIDE]).pixels)


def test_without_a_template_the_images_come_first(model, reference):
    inputs = model.to_inputs("The circle is", images=[WIDE, TALL], template=False)
    framed = "<|vision_start|><|image_pad|><|vision_end|>"
    same(inputs, reference(text=f"{framed}{framed}The circle is", images=[[WIDE, TALL]], return_tensors="pt"))
    assert inputs.segment_names() == ["vision_start", "image[0]", "vision_end", "image[1]", "question"]
    bare = model.to_inputs("", images=[WIDE], template=False)
    assert bare.segment_names() == ["vision_start", "image[0]", "vision_end"]


# ---- loading ----------------------------------------------------------------------------------

PUBLISHED = {  # as in Qwen/Qwen2-VL-2B-Instruct
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


@pytest.fixture()
def folder(tmp_path, processor):
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    return tmp_path


def test_a_folder_in_the_published_layout(folder, cfg):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    loaded = Processor.from_folder(folder)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert dict(loaded.image_processor.size) == {"shortest_edge": 3136, "longest_edge": 12845056}
    assert loaded.video_size == {"shortest_edge": 3136, "longest_edge": 12845056}
    ours = loaded.to_inputs(cfg, "what?", images=[WIDE], videos=[frames(2)])
    assert ours == tiny_processor(3136, 12845056).to_inputs(cfg, "what?", images=[WIDE], videos=[frames(2)])


def test_videos_may_have_settings_of_their_own(folder):
    settings = {"size": {"shortest_edge": 784, "longest_edge": 7840}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    assert Processor.from_folder(folder).video_size == settings["size"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert Processor.from_folder(folder).video_size == VIDEO_SIZE


def test_the_references_processor_is_taken(processor, reference, cfg):
    taken = Processor.from_hf(reference)
    arguments = {"prompt": "what?", "images": [WIDE], "videos": [frames(2)]}
    assert taken.to_inputs(cfg, **arguments) == processor.to_inputs(cfg, **arguments)


def test_a_folder_with_something_missing(folder):
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Processor.from_folder(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="no preprocessor_config.json, and no processor_config.json"):
        Processor.from_folder(folder)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        Processor.from_folder(folder)


def test_a_base_model_has_no_template(cfg):
    processor = tiny_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="template=False"):
        processor.to_inputs(cfg, "what?", images=[WIDE])
    assert processor.to_inputs(cfg, "what?", images=[WIDE], template=False).grid() == (3, 5)


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": []}, "at least one"),
        ({"prompt": 3}, "got 3"),
        ({"prompt": ["a", ""]}, "prompt is empty"),
        ({"prompt": "  \n"}, "prompt is empty"),
        ({"prompt": "a", "messages": [user("b")]}, "not both"),
        ({"prompt": ["a", "b"], "answers": ["c"]}, "expected 2 answers"),
        ({"prompt": "a", "answers": ""}, "empty string in answers"),
        ({"prompt": "a", "template": False, "system": "b"}, "needs the chat template"),
        ({"prompt": "a", "images": np.asarray(WIDE)}, "wrap it in a list"),
        ({"prompt": "a", "images": ["https://example.org/a.png"]}, "web address"),
        ({"prompt": "a", "images": [3]}, "got int"),
        ({"prompt": "a", "images": [np.zeros((4, 4, 3))]}, "uint8"),
        ({"prompt": "a", "images": [torch.zeros(4, 4, 3, dtype=torch.bfloat16)]}, "torch.bfloat16"),
        ({"prompt": "a", "images": [np.zeros((0, 5, 3), dtype=np.uint8)]}, "size is 5×0"),
        ({"prompt": "a", "images": [Image.new("RGB", (5, 1006))]}, "too long and thin"),
        ({"prompt": "a", "images": [WIDE], "min_pixels": 2, "max_pixels": 1}, "more than max_pixels"),
        ({"prompt": "a", "images": [WIDE], "max_pixels": -5}, "positive whole number"),
        ({"prompt": "a", "images": [WIDE], "max_pixels": 1e6}, "positive whole number"),
        ({"prompt": "a", "videos": [WIDE, WIDE]}, "list of frames"),
        ({"prompt": "a", "videos": ["clip.mp4"]}, "list of frames"),
        ({"prompt": "a", "videos": [[]]}, "no frames"),
        ({"prompt": "a", "videos": [[WIDE, TALL]]}, "differ in size"),
        ({"prompt": "a <|video_pad|>", "special_tokens": True}, "refers to 1 videos"),
        ({"messages": []}, "expected messages="),
        ({"messages": {"role": "user", "content": "a"}}, "expected messages="),
        ({"messages": ["a"]}, "every message to be"),
        ({"messages": [{"role": "system", "content": "a"}]}, "one message of the user"),
        ({"messages": [user("a")], "images": [WIDE]}, "carry their own images"),
        ({"messages": [user("a"), assistant("b")], "answers": "c"}, "use one of them"),
        ({"messages": [{"role": "user", "content": []}]}, "no content"),
        ({"messages": [user(text(" "))]}, "no text and no image"),
        ({"messages": [user({**text("what?"), "image": WIDE})]}, r"type 'text' with \['image'\]"),
        ({"messages": [user({**image(WIDE), "text": "what?"})]}, r"type 'image' with \['text'\]"),
        ({"messages": [user({"type": "image"}, text("a"))]}, "without its 'image'"),
        ({"messages": [user({"type": "audio", "text": "x"}, text("a"))]}, "expected a 'type' of"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "expected a 'type' of"),
        ({"messages": [user({**image(WIDE), "detail": "high"}, text("a"))]}, "would have no effect"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.to_inputs(**arguments)


def test_files_that_are_no_pictures(model, tmp_path, monkeypatch):
    (tmp_path / "words.png").write_text("hello")
    (tmp_path / "nothing.png").write_bytes(b"")
    for name in ("words.png", "nothing.png", "."):
        with pytest.raises(ValueError, match="not a readable image"):
            model.to_inputs("what?", images=[tmp_path / name])
    WIDE.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large to open"):
        model.to_inputs("what?", images=[tmp_path / "large.png"])


def test_a_damaged_picture_in_memory(model, tmp_path):
    """PIL opens a file lazily: the damage shows when its pixels are wanted."""
    WIDE.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut short or damaged"):
        model.to_inputs("what?", images=[Image.open(tmp_path / "cut.png")])


@pytest.mark.parametrize("what", ["merge_size", "patch_size", "temporal_patch_size", "<|image_pad|>"])
def test_another_checkpoints_processor_is_refused(what, cfg):
    processor = tiny_processor()
    if what == "<|image_pad|>":
        cfg = copy(cfg)
        cfg.special = copy(cfg.special)
        object.__setattr__(cfg.special, "image", 7)
    else:
        setattr(processor.image_processor, what, 4)
    with pytest.raises(ValueError, match=f"belongs to another checkpoint: .*{what.strip('<|>')}"):
        processor.to_inputs(cfg, "what?")
