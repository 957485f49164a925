"""Prompts and images against the reference processor, and what is where in them."""

from __future__ import annotations

import matplotlib.cbook
import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from tiny import CHAT_TEMPLATE, tiny_processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hooked_qwen2vl import Inputs


def reference_ids(processor, messages, n_tokens):
    """The chat template applied whole, each placeholder repeated, tokenised whole."""
    text = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, chat_template=CHAT_TEMPLATE
    )
    for n in n_tokens:
        text = text.replace("<|image_pad|>", "<|placeholder|>" * n, 1)
    return processor.tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"))["input_ids"]


@pytest.mark.parametrize("question", ["what?", "user", "red\nblue  red", "ein schönes 图", "<b>system</b>"])
def test_ids_are_those_of_the_whole_template(model, processor, question):
    images = [picture(140, 84), picture(56, 84)]
    inputs = model.to_inputs(question, images=images)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}]
    sizes = [visual.n_tokens for visual in inputs.visuals]
    assert inputs.tokens[0].tolist() == reference_ids(processor, [{"role": "user", "content": content}], sizes)
    asked = inputs.tokens[0, inputs.span("question")]
    assert model.to_string(asked) == question
    assert model.to_string(inputs.tokens[0, inputs.span("system")]) == "You are a helpful assistant."


def test_parts_partition_a_row(model, batches):
    for inputs in batches.values():
        for row in range(len(inputs)):
            names = inputs.part_names(row)
            found = torch.cat([inputs.positions(name, row) for name in names])
            assert sorted(found.tolist()) == inputs.attention_mask[row].nonzero().flatten().tolist()


def test_the_answer_is_teacher_forced(model, batches):
    inputs = batches["batch"]
    assert model.to_string(inputs.tokens[0, inputs.span("answer", 0)]) == "blue"
    assert inputs.positions("last", 0)[0] == inputs.positions("answer", 0)[0] - 1
    assert inputs.positions("last", 1)[0] == inputs.shape[1] - 1
    assert (inputs.labels[1] == -100).all() and (inputs.labels[0] != -100).sum() == len(inputs.positions("answer", 0))


def test_a_photograph_as_the_reference_processes_it(model):
    """At its real size, with Qwen2-VL's own settings."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    assert photograph.size == (512, 600)
    settings = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
    reference = Qwen2VLImageProcessorPil(**settings)(images=[photograph], return_tensors="pt")
    inputs = tiny_processor(*settings.values()).to_inputs(_roomy(model.cfg), "who?", images=[photograph])
    assert torch.equal(inputs.pixels, reference["pixel_values"])
    assert torch.equal(inputs.image_grids, reference["image_grid_thw"])
    rows, cols = inputs.grid()
    assert (rows, cols) == (21, 18) and len(inputs.positions("image")) == rows * cols
    boxes = inputs.boxes()
    assert boxes[0].tolist() == pytest.approx([0, 0, 512 / 18, 600 / 21])
    assert boxes[-1].tolist() == pytest.approx([512 - 512 / 18, 600 - 600 / 21, 512, 600])
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
    assert float(area) == pytest.approx(512 * 600)
    second_of_row_three = inputs.positions((30.0, 100.0, 31.0, 101.0))
    assert second_of_row_three.tolist() == [int(inputs.positions("image")[0]) + 3 * cols + 1]


def _roomy(cfg):
    from copy import copy

    roomy = copy(cfg)
    roomy.n_ctx = 4096
    return roomy


def test_a_video_is_its_frames_in_pairs(model):
    """Against naive loops over frames, merge blocks, patches and pixels."""
    frames = [picture(56, 84, seed) for seed in range(3)]
    inputs = model.to_inputs("what?", videos=[frames])
    assert inputs.video_grids.tolist() == [[2, 6, 4]]
    arrays = [np.asarray(frame, dtype=np.float64) / 255 for frame in [*frames, frames[-1]]]
    theirs = model.processor.image_processor
    arrays = [(a - np.array(theirs.image_mean)) / np.array(theirs.image_std) for a in arrays]
    patches = []
    for t in range(2):
        for block_row in range(3):
            for block_col in range(2):
                for r in range(2):
                    for c in range(2):
                        y, x = (2 * block_row + r) * 14, (2 * block_col + c) * 14
                        pair = np.stack([arrays[2 * t + f][y : y + 14, x : x + 14] for f in range(2)])
                        patches.append(pair.transpose(3, 0, 1, 2).reshape(-1))
    assert np.allclose(inputs.pixels.numpy(), np.stack(patches), atol=1e-5)
    assert len(inputs.positions("video[0].frame[1]")) == 6


def test_rows_keep_their_own_images(model, batches):
    inputs = batches["batch"]
    with torch.no_grad():
        logits = model(inputs)
        for rows in ([2, 0], [1, 1, 3]):
            assert torch.allclose(model(inputs[torch.tensor(rows)]), logits[rows], atol=1e-4)
        assert torch.allclose(model(inputs[1].repeat(2, 1))[1], logits[1], atol=1e-4)
    assert inputs[1] == inputs[1:2] and inputs[1] != inputs[3]
    with pytest.raises(IndexError, match="by row only"):
        inputs[:, :5]


def test_a_padded_row_equals_the_row_alone(model, batches):
    inputs = batches["batch"]
    alone = model.to_inputs("which of the two is red?", images=[[picture(60, 115, 2), picture(56, 56, 3)]][0])
    with torch.no_grad():
        padded, single = model(inputs)[1], model(alone)[0]
    assert torch.allclose(padded[inputs.attention_mask[1].bool()], single, atol=1e-4)


def test_the_references_mapping_is_taken(model, batches):
    from tiny import reference_batch

    for kind, inputs in batches.items():
        again = Inputs.from_processor(reference_batch(inputs), model.cfg)
        assert torch.equal(again.position_ids, inputs.position_ids), kind
        with torch.no_grad():
            assert torch.equal(model(again), model(inputs)), kind


# ---- bad input --------------------------------------------------------------------------------


def test_tokens_with_placeholders_never_run_without_their_image(model, batches):
    with pytest.raises(ValueError, match="never run"):
        model(batches["image"].tokens)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "hi <|image_pad|>"}, "refers to 1 images"),
        ({"prompt": "hi <|image_pad|>", "images": [picture(56, 56)] * 2}, "2 images came with it"),
        ({"prompt": "hi", "images": ["nowhere.png"]}, "there is no image at"),
        ({"prompt": "hi", "images": [Image.new("RGB", (0, 5))]}, "no pixels"),
        ({"prompt": "hi", "images": [Image.new("RGB", (6000, 20))]}, "too long and thin"),
        ({"prompt": "hi", "images": picture(56, 56)}, "wrap it in a list"),
        ({"prompt": "hi", "images": [np.zeros((4, 4))]}, "expected an image array"),
        ({"prompt": "word " * 600}, "context"),
        ({"prompt": ["a", "b"], "images": [[]]}, "a list of 2 lists"),
        ({"messages": [{"role": "robot", "content": "hi"}, {"role": "user", "content": "hi"}]}, "role 'robot'"),
        ({}, "either a prompt"),
    ],
)
def test_bad_input_says_what_is_wrong(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.to_inputs(**arguments)


def test_a_damaged_image_file(model, tmp_path):
    path = tmp_path / "cut.png"
    picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a readable image"):
        model.to_inputs("hi", images=[path])
