"""Prompts and images against the reference processor, and what is where in them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import half_characters
import matplotlib.cbook
import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from tiny import CHAT_TEMPLATE, reference_batch, tiny_hf, tiny_processor
from transformer_lens.tools.analysis.attribution_patching import attribution_patch
from transformer_lens.tools.analysis.interchange import collect_activations
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.positions import IMAGE


def reference_ids(processor, messages, n_tokens):
    """The chat template applied whole, each placeholder repeated, tokenised whole."""
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=CHAT_TEMPLATE)
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
            names = inputs.segment_names(row)
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
    for kind, inputs in batches.items():
        again = Inputs.from_processor(reference_batch(inputs), model.cfg)
        assert torch.equal(again.position_ids, inputs.position_ids), kind
        with torch.no_grad():
            assert torch.equal(model(again), model(inputs)), kind


# ---- like a token tensor ----------------------------------------------------------------------

INDICES = [
    2, -1, np.int64(1), torch.tensor(3), slice(None), slice(1, 3), slice(None, None, 2), [3, 0], np.array([1, 1]),
    torch.tensor([2, 2, 0]), torch.tensor([True, False, False, True]), [False, True, True, False],
]  # fmt: skip


def patches_of(inputs: Inputs) -> list[list[torch.Tensor]]:
    """For each row, the pixels of its own images."""
    packs = iter(inputs.pixels.split([visual.n_patches for visual in inputs.visuals]))
    rows: list[list[torch.Tensor]] = [[] for _ in range(len(inputs))]
    for visual in inputs.visuals:
        rows[visual.row].append(next(packs))
    return rows


def same_rows(ours: Inputs, inputs: Inputs, rows: list[int]) -> None:
    """Everything that belongs to a row went with it."""
    assert ours.tokens.tolist() == inputs.tokens[rows].tolist()
    assert ours.attention_mask.tolist() == inputs.attention_mask[rows].tolist()
    assert ours.token_types.tolist() == inputs.token_types[rows].tolist()
    assert ours.position_ids.tolist() == inputs.position_ids[:, rows].tolist()
    assert ours.rope_delta.tolist() == inputs.rope_delta[rows].tolist()
    assert list(ours.segments) == [inputs.segments[row] for row in rows]
    assert [[v.grid for v in ours.visuals if v.row == i] for i in range(len(rows))] == [
        [v.grid for v in inputs.visuals if v.row == row] for row in rows
    ]
    for mine, row in zip(patches_of(ours) if ours.visuals else [[]] * len(rows), rows, strict=True):
        theirs = patches_of(inputs)[row]
        assert len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_rows_are_indexed_as_a_tensors(index, batches):
    inputs = batches["batch"]
    chosen = torch.arange(4)[index].reshape(-1).tolist()
    same_rows(inputs[index], inputs, chosen)
    assert inputs[index].ndim == 2  # an int too: an image needs its row


@pytest.mark.parametrize("index", [(slice(None), 0), (0, 0), None, True, ..., torch.zeros(2, 2, dtype=torch.long), 4, -5])
def test_positions_are_not_cut_out(index, batches):
    with pytest.raises(IndexError):
        batches["batch"][index]


def test_it_quacks_like_its_tokens(batches):
    inputs = batches["batch"]
    tokens = inputs.tokens
    assert inputs.shape == tokens.shape and inputs.size() == tokens.size() and inputs.size(1) == tokens.size(1)
    assert inputs.ndim == inputs.dim() == 2 and len(inputs) == 4 and inputs.numel() == tokens.numel()
    assert inputs.dtype == torch.long and inputs.device == tokens.device
    assert (inputs.numpy() == tokens.numpy()).all()
    assert repr(inputs) == f"Inputs(batch 4, pos {tokens.shape[1]}, images 4, videos 0)"
    for number, row in enumerate(inputs):
        same_rows(row, inputs, [number])
    for rows in (inputs.repeat(2), inputs.repeat(2, 1), inputs.repeat((2, 1)), inputs.repeat(torch.Size([2, 1]))):
        same_rows(rows, inputs, [0, 1, 2, 3] * 2)
        assert rows.tokens.tolist() == tokens.repeat(2, 1).tolist()
    for copied in (inputs.cpu(), inputs.to("cpu"), inputs.to(torch.device("cpu")), inputs.clone(), inputs.detach()):
        assert copied == inputs
    for sizes in ((1, 2), (2, 2), (1, 1, 1), ()):
        with pytest.raises(ValueError, match="only rows can be repeated"):
            inputs.repeat(*sizes)
    with pytest.raises(ValueError, match="ids stay integers"):
        inputs.to(torch.float32)


def test_torch_makes_no_bare_tokens_of_it(batches):
    """Whatever torch would return could only be ids without their images."""
    inputs = batches["batch"]
    for make in (lambda: torch.cat([inputs, inputs]), lambda: torch.stack([inputs]), lambda: torch.clone(inputs)):
        with pytest.raises(TypeError):
            make()


def test_it_is_frozen_and_a_clone_is_apart(batches):
    inputs = batches["batch"]
    with pytest.raises(FrozenInstanceError):
        inputs.tokens = inputs.tokens + 1
    copied = inputs.clone()
    for name in ("tokens", "attention_mask", "token_types", "position_ids", "rope_delta", "pixels"):
        before = getattr(inputs, name).clone()
        getattr(copied, name).add_(1)
        assert torch.equal(getattr(inputs, name), before), name


def test_equal_only_if_the_images_are(model):
    one, other = ([picture(140, 84, seed)] for seed in (1, 2))
    ask = "what is this?"
    inputs = model.to_inputs(ask, images=one)
    assert inputs == model.to_inputs(ask, images=one)
    assert torch.equal(inputs.tokens, model.to_inputs(ask, images=other).tokens)
    assert inputs != model.to_inputs(ask, images=other)
    assert inputs != model.to_inputs("what is that?", images=one)
    assert model.to_inputs(ask) != inputs and model.to_inputs(ask) == model.to_inputs(ask)
    assert inputs != inputs.tokens.tolist()
    forced, said = (model.to_inputs("the", answers=" red", template=False), model.to_inputs("the red", template=False))
    assert torch.equal(forced.tokens, said.tokens) and forced != said  # an answer and a question
    with pytest.raises(TypeError):
        hash(inputs)


def test_a_prefix_goes_with_its_rows(model, batches):
    inputs = batches["batch"]
    n_tokens = [visual.n_tokens for visual in inputs.visuals]
    prefix = torch.arange(sum(n_tokens) * 2.0).reshape(-1, 2)
    encoded = inputs.with_image_embeddings(prefix, ("somebody",))
    assert inputs.image_embeds is None and "encoded" in repr(encoded)
    first, second, third, fourth = prefix.split(n_tokens)  # rows 0, 1, 1 and 3
    assert torch.equal(encoded[[3, 1, 2]].image_embeds, torch.cat((fourth, second, third)))
    assert torch.equal(encoded[0].repeat(2).image_embeds, torch.cat((first, first)))
    assert encoded[[2]].image_embeds is None and encoded[[2]].pixels is None


def test_the_texts_own_padding_side_does_not_matter(model, batches):
    """A right-padded batch of the reference's, and the same with its padding moved to the left."""
    inputs = batches["batch"]
    order = inputs.attention_mask.argsort(dim=-1, descending=True, stable=True)
    batch = reference_batch(inputs)
    right = {**batch, **{key: batch[key].gather(-1, order) for key in ("input_ids", "attention_mask")}}
    ours = Inputs.from_processor(right, model.cfg)
    assert ours.attention_mask[:, 0].all() and not ours.attention_mask[:, -1].all()
    back = ours.left_padded()
    for name in ("tokens", "attention_mask", "token_types", "position_ids", "rope_delta"):
        assert torch.equal(getattr(back, name), getattr(inputs, name)), name
    assert back == Inputs.from_processor(batch, model.cfg)
    assert inputs.left_padded() is inputs
    with torch.no_grad():
        logits, expected = model(ours), model(inputs)
    for row in range(4):
        mine = logits[row][ours.attention_mask[row].bool()]
        assert torch.allclose(mine, expected[row][inputs.attention_mask[row].bool()], atol=1e-4)
        assert int(ours.positions("last", row)) == int(ours.attention_mask[row].sum()) - 1 or "answer" in ours.segments[row]


# ---- TransformerLens's tools take it ----------------------------------------------------------


def test_interchange_reads_each_rows_own_image(model, batches):
    inputs = batches["batch"]
    name, last = "blocks.1.hook_resid_post", torch.tensor([int(inputs.positions("last", row)) for row in range(4)])
    theirs = collect_activations(model, name, inputs, lambda rows: model(rows)[:, -1], positions=last, batch_size=3)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=name)
    assert torch.allclose(theirs, cache[name][torch.arange(4), last], atol=1e-4)
    swapped = inputs[[0, 3, 2, 1]]
    assert not torch.allclose(collect_activations(model, name, swapped, lambda rows: model(rows)[:, -1], positions=last), theirs, atol=1e-2)


def test_attribution_patching_sees_the_image(model):
    """The two runs differ in nothing but the image: were it lost, every score would be 0."""
    clean, corrupt = (model.to_inputs("what?", images=[picture(84, 56, seed)]) for seed in (1, 2))
    scores = attribution_patch(model, clean, corrupt, lambda logits: logits[0, -1, 5] - logits[0, -1, 6]).node_scores
    first = int(clean.positions("image")[0])
    assert max(abs(score) for node, score in scores.items() if node.position >= first) > 1e-3
    assert max(abs(score) for node, score in scores.items() if node.position < first) == 0.0


# ---- what is where ----------------------------------------------------------------------------


def test_boxes_tile_every_image(batches):
    for inputs in batches.values():
        for visual in inputs.visuals:
            which = [v for v in inputs.visuals if (v.row, v.kind) == (visual.row, visual.kind)].index(visual)
            which = {"image": which} if visual.kind == IMAGE else {"video": which}
            boxes, (rows, cols) = inputs.boxes(visual.row, **which), inputs.grid(visual.row, **which)
            width, height = visual.size
            assert boxes.shape == (rows * cols, 4)
            table = boxes.reshape(rows, cols, 4)
            assert (table[:, 1:, 0] == table[:, :-1, 2]).all() and (table[1:, :, 1] == table[:-1, :, 3]).all()
            assert (table[:, 0, 0] == 0).all() and (table[0, :, 1] == 0).all()
            assert torch.allclose(table[:, -1, 2], torch.tensor(width).double())
            assert torch.allclose(table[-1, :, 3], torch.tensor(height).double())


def test_a_box_gives_the_tokens_it_overlaps(model):
    """Against painting: the box and every token's box drawn on a fine canvas."""
    inputs = model.to_inputs("what?", images=[picture(60, 115, 2), picture(140, 84, 1)])
    rng = np.random.default_rng(0)
    for image, (width, height) in enumerate(((60, 115), (140, 84))):
        edges = inputs.boxes(image=image)
        for _ in range(20):
            (x0, x1), (y0, y1) = (np.sort(rng.choice(size + 1, 2, replace=False)) for size in (width, height))
            ys, xs = np.meshgrid(np.arange(height * 4) / 4 + 0.125, np.arange(width * 4) / 4 + 0.125, indexing="ij")
            inside = (xs > x0) & (xs < x1) & (ys > y0) & (ys < y1)
            covered = [bool((inside & (xs > a) & (xs < c) & (ys > b) & (ys < d)).any()) for a, b, c, d in edges.tolist()]
            expected = inputs.positions(f"image[{image}]")[torch.tensor(covered)]
            assert inputs.positions((x0, y0, x1, y1), image=image).tolist() == expected.tolist()


def test_the_edges_of_a_box(model):
    inputs = model.to_inputs("what?", images=[picture(140, 84)])  # 3×5 tokens of exactly 28 pixels
    first = int(inputs.positions("image")[0])
    assert inputs.positions((0, 0, 28, 28)).tolist() == [first]  # touching is not overlapping
    assert inputs.positions((0, 0, 28.01, 28)).tolist() == [first, first + 1]
    assert inputs.positions((28, 28, 56, 56)).tolist() == [first + 6]
    assert inputs.positions((139.0, 83.0, 150.0, 100.0)).tolist() == [first + 14]  # a token past the edge at most
    assert inputs.span((0, 0, 140, 28)) == slice(first, first + 5)
    assert inputs.positions((-5, -5, 160, 100)).tolist() == inputs.positions("image[0]").tolist()
    for box in ((140, 0, 150, 10), (-10, 0, 0, 10)):
        with pytest.raises(ValueError, match="outside the image of 140×84"):
            inputs.positions(box)
    for box in ((3, 3, 3, 5), (5, 0, 3, 5), (1, 2, 3), (0, 0, float("nan"), 1)):
        with pytest.raises(ValueError, match="a box"):
            inputs.positions(box)
    with pytest.raises(ValueError, match="not contiguous"):
        inputs.span((0, 0, 28, 84))


def test_names_that_are_not_there(batches):
    inputs = batches["two images"]
    assert inputs.positions("image").tolist() == [*inputs.positions("image[0]"), *inputs.positions("image[1]")]
    assert inputs.span("image[1]").start == inputs.span("image[0]").stop + 2  # vision_end, vision_start
    assert len(inputs.positions("vision_start")) == 2
    assert inputs.positions("question", -1).tolist() == inputs.positions("question", 0).tolist()
    for ask, message in (
        (lambda: inputs.positions("image[2]"), "it has template, system, vision_start, image"),
        (lambda: inputs.positions("video"), "no segment called 'video'"),
        (lambda: inputs.positions("answer"), "no segment called 'answer'"),
        (lambda: inputs.span("vision_start"), "not contiguous"),
        (lambda: inputs.positions("image", row=1), "no row 1: the batch has 1"),
        (lambda: inputs.grid(image=2), "row 0 has 2 images, there is no image 2"),
        (lambda: inputs.boxes(video=0), "row 0 has 0 videos, there is no video 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_videos_frames(batches):
    inputs = batches["image and video"]  # five frames of 84×56: three pairs
    found = torch.cat([inputs.positions(f"video[0].frame[{t}]") for t in range(3)])
    assert torch.equal(found, inputs.positions("video[0]")) and torch.equal(found, inputs.positions("video"))
    assert inputs.grid(video=0) == (2, 3) and inputs.boxes(video=0)[-1].tolist() == [56, 28, 84, 56]
    assert inputs.position_ids[0, 0, inputs.positions("video[0].frame[2]")].unique().numel() == 1
    with pytest.raises(ValueError, match=r"has frames 0\.\.2"):
        inputs.positions("video[0].frame[3]")


def test_unpacking_puts_every_patch_in_its_place(model):
    """What is unpacked is a picture: each patch and each token where its pixels are."""
    wide, tall = picture(140, 84, 1), picture(56, 112, 2)
    inputs = model.to_inputs(["what?", "and?"], images=[[wide], [wide, tall]])
    for row, image, shown in ((0, 0, wide), (1, 0, wide), (1, 1, tall)):
        patches = inputs.unpack_image(inputs.pixels, row, image)
        rows, cols = inputs.grid(row, image)
        assert patches.shape == (2 * rows, 2 * cols, 1176)
        red = patches.reshape(2 * rows, 2 * cols, 3, 2, 14, 14)[:, :, 0, 0].permute(0, 2, 1, 3).reshape(28 * rows, -1)
        theirs = model.processor.image_processor
        expected = (np.asarray(shown)[..., 0] / 255 - theirs.image_mean[0]) / theirs.image_std[0]
        assert np.allclose(red.numpy(), expected, atol=1e-5)
    numbered = torch.arange(sum(visual.n_tokens for visual in inputs.visuals))
    assert inputs.unpack_image(numbered, 1, 1).tolist() == (30 + torch.arange(8)).reshape(4, 2).tolist()
    with pytest.raises(ValueError, match="152 patches or 38 image tokens, got 7"):
        inputs.unpack_image(torch.zeros(7))


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_ids": None}, "with 'input_ids'"),
        ({"input_ids": [[1, 2], [3]]}, "padding=True"),
        ({"input_ids": torch.tensor([1, 2])}, "batch pos"),
        ({"attention_mask": torch.ones(1, 3)}, r"like the tokens \(1, 85\), got \(1, 3\)"),
        ({"pixel_values": None}, "together"),
        ({"pixel_values": torch.zeros(4, 1176)}, "has 4 patches but image_grid_thw gives 60"),
        ({"image_grid_thw": torch.tensor([[1, 10, 6]])}, None),  # as many patches, and as many tokens: not to be told
        ({"pixel_values": torch.zeros(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}, "15 image tokens.*give 4"),
        ({"pixel_values": torch.zeros(60, 7)}, r"normalised pixels \(60, 1176\).*got \(60, 7\)"),
        ({"pixel_values": torch.zeros(60, 1176, dtype=torch.uint8)}, "torch.uint8"),
        ({"pixel_values": None, "image_grid_thw": None}, "never run"),
    ],
)  # fmt: skip
def test_a_mapping_that_does_not_fit(changes, message, model, batches):
    batch = {**reference_batch(batches["image"]), **changes}
    batch = {key: value for key, value in batch.items() if value is not None}
    if message is None:
        assert Inputs.from_processor(batch, model.cfg).grid() == (5, 3)
        return
    with pytest.raises(ValueError, match=message):
        Inputs.from_processor(batch, model.cfg)


def test_boxes_without_the_original_sizes_are_those_of_the_resized_image(model):
    inputs = model.to_inputs("what?", images=[picture(60, 115)])
    batch = reference_batch(inputs)
    assert inputs.boxes()[-1].tolist() == [30, 86.25, 60, 115]
    assert Inputs.from_processor(batch, model.cfg).boxes()[-1].tolist() == [28, 84, 56, 112]
    assert Inputs.from_processor(batch, model.cfg, image_sizes=[(60, 115)]) == inputs


def test_an_image_nobody_refers_to(model, batches):
    batch = reference_batch(batches["image"])
    text = {**batch, "input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)}
    with pytest.raises(ValueError, match="1 images and 0 videos that no placeholder refers to"):
        Inputs.from_processor(text, model.cfg)
    with pytest.raises(ValueError, match="1 image_sizes, one for each image, got 2"):
        Inputs.from_processor(batch, model.cfg, image_sizes=[(1, 1), (2, 2)])


@pytest.mark.parametrize(
    "tokens, mask, message",
    [
        (torch.zeros(1, 0, dtype=torch.long), None, "at least one token"),
        (torch.zeros(2, 2, 2, dtype=torch.long), None, "batch pos"),
        (torch.zeros(1, 2), None, "integer token ids, got torch.float32"),
        (torch.tensor([[-1, 2]]), None, "must be in 0.."),
        (torch.tensor([[1, 100_000]]), None, "must be in 0.."),
        (torch.ones(1, 600, dtype=torch.long), None, "600 tokens, the model's context 512"),
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]), "a prompt is empty"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), "padding in its middle"),
        (torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 0, 1]]), "padding in its middle"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 1]]), "zeros and ones"),
    ],
)
def test_tokens_that_are_no_prompt(tokens, mask, message, model):
    with pytest.raises(ValueError, match=message):
        Inputs.from_tokens(tokens, model.cfg, mask)


def test_padding_at_both_ends_is_padding(model):
    both = Inputs.from_tokens(torch.tensor([[1, 2, 3, 4]]), model.cfg, torch.tensor([[0, 1, 1, 0]]))
    assert both.position_ids[0, 0, 1:3].tolist() == [0, 1] and both.positions("last").tolist() == [2]
    assert both.positions("padding").tolist() == [0, 3]


def test_images_in_another_order_are_refused(model, batches):
    """Embeddings are put in placeholder by placeholder: each must be its own."""
    inputs = batches["image and video"]
    with pytest.raises(ValueError, match="not in the order of their placeholders"):
        Inputs.build(inputs.tokens, model.cfg, None, inputs.visuals[::-1], inputs.pixels)
    batch = batches["batch"]
    with pytest.raises(ValueError, match="row by row"):
        Inputs.build(batch.tokens, model.cfg, batch.attention_mask, batch.visuals[::-1], batch.pixels)


def test_tokens_with_placeholders_never_run_without_their_image(model, batches):
    with pytest.raises(ValueError, match="never run"):
        model(batches["image"].tokens)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "hi <|image_pad|>", "special_tokens": True}, "refers to 1 images"),
        ({"prompt": "hi <|image_pad|>", "images": [picture(56, 56)] * 2, "special_tokens": True}, "2 images came with it"),
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


@pytest.mark.parametrize("question", ["\n\nwhat is it?", "\n\n\nwhat\nis it?", "\nwhat", "what\n\nis it?", "what?"])
@pytest.mark.parametrize("known", [True, False], ids=["tokenizer", "ids alone"])
def test_a_question_that_begins_with_a_line_break(question, known):
    """Parts read off the ids are those that the template gave, which takes a token that begins in it."""
    own = half_characters.tokenizer()
    model = HookedQwen2VL.from_hf(tiny_hf(tokenizer=own), tiny_processor(tokenizer=own))
    inputs = model.to_inputs(question)
    cfg = model.cfg if known else HookedQwen2VL.from_hf(tiny_hf(tokenizer=own)).cfg
    assert Inputs.from_tokens(inputs.tokens, cfg).segments == inputs.segments
    assert {"system", "question", "template"} == set(inputs.segment_names())
