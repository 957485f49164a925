"""The embedded world: determinism, splits, geometry, counterfactuals, packing, and what the checkpoint can do."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from tiny import tiny_hf
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hooked_qwen2vl.scenes import CHECKPOINT, SAMPLES, contact_sheet, counterfactual_pairs, load_split, sample, to_frame
from hooked_qwen2vl.scenes import evaluate as evaluate_module
from hooked_qwen2vl.scenes.batches import Asked, Mix, Packer, draw_batch, patchify, start_levels
from hooked_qwen2vl.scenes.card import MARKS
from hooked_qwen2vl.scenes.cells import LABELS, cell_embeddings, cell_labels
from hooked_qwen2vl.scenes.domains import DOMAINS
from hooked_qwen2vl.scenes.drawing import _font, _sprite, draw, render
from hooked_qwen2vl.scenes.evaluate import best_without_image, evaluate, readable_tokens, relations_beside_shortcuts
from hooked_qwen2vl.scenes.folder import CELL, SPECIAL_TOKENS, build_config, build_tokenizer
from hooked_qwen2vl.scenes.forward import forward
from hooked_qwen2vl.scenes.questions import in_words, touches
from hooked_qwen2vl.scenes.train import Settings, Trainer, learning_rate, seeing_loss, train
from hooked_qwen2vl.scenes.words import ABSENT, ANSWERS, RELATIONS, SHAPES, vocabulary
from hooked_qwen2vl.scenes.world import dialogue, make_scene, shortcuts, single_hops, typical_color

PATCH_TOLERANCE = 1e-6  # measured 4.8e-7
PACKING_TOLERANCE = 1e-5  # measured 1.1e-6, of logits that spread by 0.45


@pytest.fixture(scope="module")
def items():
    return sample(300, seed=7)


@pytest.fixture(scope="module")
def pairs():
    return counterfactual_pairs(120, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


# ---- the world --------------------------------------------------------------------------------------


def test_same_seed_same_items_in_another_process(items):
    code = (
        "import zlib; from hooked_qwen2vl.scenes import sample\n"
        "print([(zlib.crc32(i.image.tobytes()), i.question, i.answer) for i in sample(20, seed=7)])"
    )
    environment = dict(os.environ, PYTHONHASHSEED="1")
    theirs = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ours = [(zlib.crc32(i.image.tobytes()), i.question, i.answer) for i in items[:20]]
    assert theirs.stdout.strip() == str(ours)
    assert [i.scene for i in sample(20, seed=7)] == [i.scene for i in items[:20]]
    assert [i.scene for i in sample(20, seed=8)] != [i.scene for i in items[:20]]


@pytest.mark.slow
def test_splits_share_no_scene():
    seen = {name: {dataclasses.replace(i.scene, noise=0) for i in load_split(name, 400)} for name in ("train", "validation", "test")}
    assert all(len(scenes) > 300 for scenes in seen.values())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_combinations_occur_only_in_test(split, items):
    assert any(item.unseen for item in items)
    rng = Random(0)
    for domain in DOMAINS:
        for _ in range(25):
            assert not make_scene(rng, domain, split, (5, 7)).has_unseen()
    for item in sample(100, seed=2, split=split):
        assert not item.unseen and not (item.counterfactual and item.counterfactual.scene.has_unseen())


def test_every_domain_and_category(items):
    frame = to_frame(items)
    assert set(frame.domain) == set(DOMAINS) and set(frame.category) == set(MARKS)
    assert (frame.groupby("domain").question.nunique() >= 2).all()
    assert (frame.rows != frame.cols).any() and {(4, 4), (6, 8)} <= set(zip(frame.rows, frame.cols))
    for item in items:
        assert item.image.size == (CELL * item.grid[1], CELL * item.grid[0])
        assert item.answer in item.candidates or not item.candidates
        assert item.split == "test"


def test_shapes_wear_their_typical_color_mostly():
    rng = Random(1)
    things = [t for _ in range(300) for t in make_scene(rng, "shapes", "train", (6, 6)).things]
    share = np.mean([t.color == typical_color(t.kind) for t in things])
    assert 0.68 < share < 0.84
    assert {t.kind for t in things} == set(SHAPES)


def test_boxes_and_masks_hold_the_object_and_nothing_else(items):
    for item in items[:100]:
        rows, cols = item.grid
        empty = np.asarray(render(dataclasses.replace(item.scene, things=())), dtype=int)
        differs = (np.asarray(item.image, dtype=int) != empty).any(-1)
        covered = np.zeros_like(differs)
        for thing in item.objects:
            x0, y0, x1, y1 = thing.box
            inside = thing.pixel_mask(rows, cols)
            assert inside[y0:y1, x0:x1].any() and inside.sum() == inside[y0:y1, x0:x1].sum()
            assert inside.sum() == CELL**2 * thing.mask(rows, cols).sum() == CELL**2 * len(thing.cells)
            assert not (covered & inside).any()
            for row, col in thing.cells:  # something is drawn in each of its cells
                assert differs[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL].mean() > 0.02
            covered |= inside
        assert not (differs & ~covered).any()


# ---- what is not there, hops, sentences, dialogues -----------------------------------------------------


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_what_is_asked_for_is_not_there(domain, items):
    """Answered again by hand: no thing has what the question names, or nothing touches the anchor."""
    assert all(item.category not in ("absence", "caption") for item in items)  # they come on request only
    for item in sample(20, seed=4, domain=domain, category="absence"):
        assert item.answer == ABSENT and ABSENT in item.candidates and item.counterfactual.answer in item.candidates[:-1]
        words = set(item.question.rstrip("?").split())
        side = next((side for side in RELATIONS if f" {side} " in item.question), None)
        if side:
            (anchor,) = item.depends_on
            assert {anchor.kind, anchor.color} & words and not any(touches(thing, anchor, side) for thing in item.objects)
        else:
            names = {name for name in words if any(name in group for group in (*ANSWERS.values(), ("arrow",)))}
            assert names and not any(names <= {t.kind, t.color} for t in item.objects)


def test_single_hops_are_of_the_things_of_the_relation():
    for item in sample(25, seed=2, category="relation"):
        neighbor, anchor = item.depends_on
        first, second = single_hops(item)
        for hop, thing in ((first, anchor), (second, neighbor)):
            assert {(t.kind, t.color) for t in hop.depends_on} == {(thing.kind, thing.color)} and hop.scene == item.scene
        assert second.answer in (item.answer, "yes") and first.category in ("attribute", "existence")
    with pytest.raises(ValueError, match="expected a relation question"):
        single_hops(sample(1, category="count")[0])


def test_shortcuts_by_hand():
    for item in sample(25, seed=5, category="relation"):
        side = next((side for side in RELATIONS if f" {side} " in item.question), None)
        found = shortcuts(item.scene, item.depends_on, item.question, item.candidates)
        target, anchor = item.depends_on
        assert all(target in things and anchor not in things for things in found.values())
        if side:
            axis, sign = (1 if side in ("left of", "right of") else 0), (-1 if side in ("left of", "above") else 1)
            places = np.array(sorted(anchor.cells))[:, axis] * sign
            for thing in item.objects:
                beyond = bool((np.array(sorted(thing.cells))[:, axis] * sign).min() > places.max())
                asked = thing.color in item.candidates or thing.kind in item.candidates
                assert (thing in found["on that side"]) == (beyond and asked)


def test_the_shortcuts_scores_are_shares_of_things_with_the_right_answer():
    items = sample(20, seed=9, domain="charts", category="relation")
    table = relations_beside_shortcuts(CHECKPOINT, items)
    by_hand = np.mean([np.mean([t.color == i.answer for t in i.objects if t != i.depends_on[1]]) for i in items])
    assert table.loc["all", "any other thing"] == pytest.approx(by_hand) and table.loc["all", "items"] == 20 == table.loc["charts", "items"]
    assert table.loc["all", "accuracy"] == evaluate(items).right.mean()


@pytest.mark.parametrize(
    "question, answer, sentence",
    [
        ("What color is the star?", "red", "The star is red."),
        ("What color are the dots?", "blue", "The dots are blue."),
        ("What color is the star?", "none", "There is none."),
        ("What shape is left of the circle?", "heart", "A heart is left of the circle."),
        ("What digit is red?", "4", "The digit 4 is red."),
        ("How many hearts are there?", "2", "The number of hearts is 2."),
        ("Is there an orange bar?", "no", "No, there is no orange bar."),
        ("Are there red dots?", "yes", "Yes, there are red dots."),
        ("Which bar is tallest?", "red", "The red bar is tallest."),
        ("Which way does the red arrow point?", "up", "The red arrow points up."),
    ],
)
def test_answers_in_words(question, answer, sentence):
    assert in_words(question, answer) == (f"{question} Answer in words.", sentence)
    assert in_words("Read the text.", "K83") is None


def test_a_dialogue_ends_with_the_items_own_question(items):
    for item in items[:20]:
        earlier = dialogue(item, 3)
        assert len(earlier) == 2 and item.question not in [question for question, _ in earlier]
        assert dialogue(item, 3) == earlier
    with pytest.raises(ValueError, match="at least 2 turns"):
        dialogue(items[0], 1)


# ---- cells ------------------------------------------------------------------------------------------


def test_cells_say_what_is_drawn_in_them(items):
    for item in items[:60]:
        labels = cell_labels(item.scene).reshape(*item.grid, -1)
        for head, field in enumerate(("kind", "color")):
            named = np.array(LABELS[field])[labels[..., head]]
            for thing in item.objects:
                assert set(named[thing.mask(*item.grid)]) == {getattr(thing, field)}
            covered = np.logical_or.reduce([thing.mask(*item.grid) for thing in item.objects])
            assert set(named[~covered]) <= {"nothing"}
        assert set(np.array(LABELS["background"])[labels[..., -1]].ravel()) == {item.scene.background}


def test_written_cells_are_sums_of_word_embeddings():
    tokenizer = build_tokenizer()
    embedding = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(0))
    word = {w: embedding[tokenizer.convert_tokens_to_ids(w)] for w in ("red", "star", "big", "top", "left", "small", "gray")}
    empty = {name: 0 for name in LABELS} | {"background": LABELS["background"].index("gray")}
    star = empty | {"kind": LABELS["kind"].index("star"), "color": LABELS["color"].index("red")}
    cells = [empty, star | {"part": LABELS["part"].index("whole")}, star | {"part": LABELS["part"].index("top left")}]
    written = cell_embeddings(embedding, tokenizer, torch.tensor([[cell[name] for name in LABELS] for cell in cells]))
    thing = word["red"] + word["star"] + word["gray"] / 2
    by_hand = torch.stack([word["gray"] / 2, thing + word["small"] / 2, thing + (word["big"] + word["top"] + word["left"]) / 2])
    assert torch.allclose(written, by_hand, atol=1e-6)


def test_image_tokens_that_read_as_their_things(monkeypatch, tokenizer):
    """Planted in the embeddings: every cell of a thing reads as its kind, in one of two spellings. One picture a batch has no control."""
    runs = evaluate_module._runs

    def planted(model, *arguments):
        for chunk, batch, streams in runs(model, *arguments):
            image = batch.tokens[0] == model.config.image_token_id
            kinds = [LABELS["kind"][label] for label in batch.cells[:, 0].tolist()]
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(("Ġ" if n % 2 else "") + kind) for n, kind in enumerate(kinds)])
            word = torch.nn.functional.one_hot(ids, len(tokenizer)).float() @ torch.linalg.pinv(model.lm_head.weight.T)
            streams[0][:, image] = word.view(len(chunk), -1, word.shape[-1])
            yield chunk, batch, streams

    monkeypatch.setattr(evaluate_module, "_runs", planted)
    plain = lambda n, **restrictions: sample(n, **restrictions, domain="shapes", grid=(4, 4))  # noqa: E731
    monkeypatch.setattr(evaluate_module, "sample", plain)
    table = readable_tokens(CHECKPOINT, 12)
    for way in ("lens", "cosine"):
        assert table.loc[f"{way}, embeddings", "read"] > 0.95 and table.loc[f"{way}, best layer", "layer"] == 0
        assert table.loc[f"{way}, embeddings", "of another picture"] < 0.6
    assert np.isnan(readable_tokens(CHECKPOINT, 1).loc["lens, embeddings", "of another picture"])


# ---- counterfactuals --------------------------------------------------------------------------------


def test_partners_differ_in_one_attribute_of_one_object(pairs):
    for item, other in pairs:
        assert item.question == other.question and item.grid == other.grid and item.answer != other.answer
        before, after = other.changed
        if before.kind == "background":
            assert item.objects == other.objects and before.color == item.scene.background
        else:
            assert set(item.objects) ^ set(other.objects) == {before, after}
        changed = {f.name for f in dataclasses.fields(before) if getattr(before, f.name) != getattr(after, f.name)}
        assert changed in (
            {"color"}, {"kind"}, {"facing"}, {"rows", "cols"}, {"row", "rows"}, {"path", "facing"}, {"path"}
        )  # a size changes both sides, a height the top, a reversed path where it points  # fmt: skip


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_partner_is_held_out_where_its_scene_is(split):
    for item, partner in counterfactual_pairs(30, seed=7, split=split):
        assert item.split == split and (partner.split == "train") == (split == "train")


def test_pixels_change_only_in_the_cells_of_the_changed_object(pairs):
    for item, other in pairs:
        rows, cols = item.grid
        allowed = np.logical_or(*(thing.pixel_mask(rows, cols) for thing in other.changed))
        differs = (np.asarray(item.image) != np.asarray(other.image)).any(-1)
        assert differs.any() and not (differs & ~allowed).any()


def test_answers_of_partners_are_single_tokens(pairs, tokenizer):
    for item, other in pairs:
        ours, theirs = (tokenizer(i.answer)["input_ids"] for i in (item, other))
        assert len(ours) == len(theirs) == 1 and ours != theirs


def test_answers_follow_from_the_objects(items):
    """Two forms of question, answered again by hand."""
    checked = 0
    for item in items:
        words = item.question.rstrip("?").split()
        if item.question.startswith("Is there a") and item.domain == "shapes":
            wanted = set(words[3:])
            found = any(wanted <= {t.kind, t.color} for t in item.objects)
            assert item.answer == ("yes" if found else "no")
            checked += 1
        if item.question == "Which bar is tallest?":
            assert item.answer == max(item.objects, key=lambda t: t.rows).color
            checked += 1
    assert checked >= 8


def test_noise_belongs_to_the_scene_not_to_chance(items):
    scene = items[0].scene
    assert (draw(scene) == draw(scene)).all()
    assert (draw(scene) != draw(dataclasses.replace(scene, noise=scene.noise + 1))).any()


def test_a_glyphs_font_belongs_to_its_place_in_the_scene():
    """Both fonts occur and look different; a glyph of another kind or colour in its place keeps the font: only what was changed differs."""
    items = sample(30, seed=5, domain="glyphs")
    fonts = {_font(item.scene, thing) for item in items for thing in item.objects}
    assert len(fonts) == 2 and not any(_font(item.scene, thing) for item in sample(10, domain="shapes") for thing in item.objects)
    for item in items:
        for thing in item.objects:
            assert _font(item.scene, dataclasses.replace(thing, kind="A", color="red")) == _font(item.scene, thing)
    sprites = [_sprite("A", "red", 1, 1, "", (), font)[1] for font in fonts]
    assert abs(sprites[0] - sprites[1]).mean() > 0.05


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"domain": "faces"}, "expected a domain of shapes"),
        ({"category": "taste"}, "expected a category of attribute"),
        ({"domain": "charts", "category": "ocr"}, "has no ocr questions"),
        ({"split": "dev"}, "expected a split of train"),
        ({"grid": (3, 6)}, "grid of 4 to 8"),
        ({"level": 9}, "level of 1 to 5"),
    ],
)
def test_bad_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        sample(1, **request_)


def test_contact_sheet(tmp_path, items):
    assert contact_sheet(items[:4], tmp_path / "new" / "sheet.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="at least one item"):
        contact_sheet([], tmp_path / "none.png")


# ---- the folder -------------------------------------------------------------------------------------


def test_tokenizer_is_qwen2s_with_whole_words(tokenizer):
    assert type(tokenizer) is Qwen2Tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + len(SPECIAL_TOKENS)))
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in vocabulary())
    assert all(len(tokenizer(word)["input_ids"]) == 1 for group in ANSWERS.values() for word in group)
    for text in ("Über 42 zebras, 東京 & <b>", "a small red star , a big blue circle", "LK7"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("zebra")["input_ids"]) > 1


def test_questions_fall_into_whole_words(items, tokenizer):
    for item in items:
        text = item.question.rstrip("?.")
        assert len(tokenizer(text)["input_ids"]) <= len(text.split()) + 1  # a digit and its space are two


def test_chat_template(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "Read the text."}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>Read the text.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_folder_fits_and_is_what_it_says():
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) < 16 * 2**20
    model = Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT)
    text, vision = model.config.text_config, model.config.vision_config
    assert 8 <= text.num_hidden_layers <= 12 and text.num_key_value_heads < text.num_attention_heads
    assert model.config.tie_word_embeddings and vision.depth >= 3
    assert {path.name for path in SAMPLES.glob("*.png")} == {"shapes.png", "glyphs.png", "charts.png"}


# ---- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 6), (5, 5)])
def test_patches_equal_the_reference_processors(grid):
    scenes = [make_scene(Random(k), "textures", "test", grid) for k in range(2)]
    theirs = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)(images=[render(scene) for scene in scenes], return_tensors="pt")
    ours = torch.from_numpy(patchify(np.stack([draw(scene) for scene in scenes])))
    assert (ours - theirs["pixel_values"]).abs().max() < PATCH_TOLERANCE
    assert theirs["image_grid_thw"].tolist() == [[1, 2 * grid[0], 2 * grid[1]]] * 2  # not resized
    transposed = torch.from_numpy(patchify(np.stack([draw(scene) for scene in scenes]).swapaxes(1, 2)))
    assert ours.shape != transposed.shape or (ours - transposed).abs().max() > 0.1


def test_a_packed_question_is_a_single_turn_prompt():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer)).eval()
    scene = make_scene(Random(0), "shapes", "train", (4, 6))
    asked = [Asked("What color is the star?", "red", "attribute"), Asked("How many hearts are there?", "2", "count")]
    batch = Packer(tokenizer).pack([scene], [asked])
    pixels = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)(images=[render(scene)], return_tensors="pt")
    with torch.no_grad():
        packed = forward(model, batch) @ model.lm_head.weight.T
        for (row, at, _, _), (question, _, _) in zip(batch.labels, [one[:3] for one in asked]):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            ).replace("<|image_pad|>", "<|image_pad|>" * 24)
            tokens = torch.tensor([tokenizer(text)["input_ids"]])
            model.model.rope_deltas = None
            alone = model(input_ids=tokens, mm_token_type_ids=(tokens == model.config.image_token_id).int(), **pixels).logits[0, -1]
            assert (packed[row, at] - alone).abs().max() < PACKING_TOLERANCE
            assert (packed[row, at - 1] - alone).abs().max() > 100 * PACKING_TOLERANCE


def test_a_dialogue_is_packed_as_the_chat_template_has_it(tokenizer):
    scene = make_scene(Random(0), "shapes", "train", (4, 4))
    one = Asked("How many shapes are there?", "2", "count", (("Is there a star?", "no"), ("What shape is red?", "heart")))
    batch = Packer(tokenizer).pack([scene], [[one]])
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a star?"}]}
    turns = [image, *({"role": role, "content": text} for role, text in (
        ("assistant", "no"), ("user", "What shape is red?"), ("assistant", "heart"), ("user", one.question), ("assistant", "2"),
    ))]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n").replace("<|image_pad|>", "<|image_pad|>" * 16)
    assert batch.tokens[0].tolist() == tokenizer(text)["input_ids"]
    ends = [tokenizer.decode(batch.targets[0, at : at + 2]) for at in (batch.targets[0] >= 0).nonzero().flatten().tolist()[::2]]
    assert ends == ["no<|im_end|>", "heart<|im_end|>", "2<|im_end|>"]
    ((row, at, *_),) = batch.labels
    assert tokenizer.decode(batch.targets[row, at]) == "2"


def test_crowded_relations_cannot_be_answered_by_half_a_hop(tokenizer):
    mix = Mix(dict.fromkeys(DOMAINS, 5), {}, relation=1.0, crowded=True)
    batch = draw_batch(Packer(tokenizer), Random(3), mix, (6, 6), 15, 3, pictures=False)
    categories = [category for *_, category in batch.labels if category != "caption"]
    assert categories.count("relation") > 0.7 * len(categories) and batch.pixels.numel() == 0
    plain = draw_batch(Packer(tokenizer), Random(3), Mix(start_levels(), {}), (6, 6), 5, 2)
    assert plain.pixels.shape[0] == 5 * 36 * 4 and len(plain.cells) == 5 * 36


def test_learning_rate_warms_up_and_ends_at_zero():
    settings = Settings(minutes=10, decay=0.5)
    assert learning_rate(settings, "together", 0, 0) < settings.lr / 100
    assert learning_rate(settings, "together", 1000, 100) == settings.lr
    assert learning_rate(settings, "together", 1000, 450) == pytest.approx(settings.lr / 2)
    assert learning_rate(settings, "together", 1000, 600) == 0
    assert learning_rate(settings, "reading", 1000, 600) == settings.lr


def test_what_is_seen_is_measured_against_what_is_written():
    """0 for the written cells themselves (but for what the heads say), and more the farther off."""
    written = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 1, 1, 0, 0]] * 6 + [[0, 0, 0, 0, 1]] * 6)
    heads = torch.nn.ModuleList(torch.nn.Linear(8, len(classes)) for classes in LABELS.values())
    for head in heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    exact, off = (float(seeing_loss(tokens, written, heads, labels)[0].detach()) for tokens in (written, 2 * written))
    assert exact == pytest.approx(sum(np.log(len(classes)) for classes in LABELS.values()), rel=1e-5) and off > exact + 3


def test_training_goes_on_from_where_it_stopped(tmp_path):
    state, out = tmp_path / "state.pt", tmp_path / "out"
    small = Settings(reading_minutes=0.005, seeing_minutes=0.005, minutes=0.005, images=5, questions=2)
    first = train(small, state, out)
    assert min(first.steps.values()) >= 1 and (out / "model.safetensors").exists()
    more = dataclasses.replace(small, minutes=first.seconds["together"] / 60 + 0.005)
    second = train(more, state, out)
    assert second.steps["together"] > first.steps["together"] and second.steps["reading"] == first.steps["reading"]
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == second.steps and "First the decoder alone" in record["how"]


def test_a_run_begins_from_another_models_weights_token_by_token(tmp_path, tokenizer, monkeypatch):
    """The vocabulary of the run has other ids, and a token that the folder does not have."""
    monkeypatch.setattr("hooked_qwen2vl.scenes.folder.vocabulary", lambda: ["Zebra", *vocabulary()])
    trainer = Trainer(Settings(start=str(CHECKPOINT), level=3), tmp_path / "state.pt", tmp_path / "out")
    model, _ = evaluate_module.load_model()
    theirs = model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        if name not in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(weight, theirs[name]), name
    known, embedding = tokenizer.get_vocab(), trainer.model.lm_head.weight.detach()
    ids = trainer.tokenizer.get_vocab()
    assert "Zebra" in ids and any(ids[token] != known[token] for token in known)
    for token in ("red", " red", "<|im_end|>", "A"):
        token = token.replace(" ", "Ġ")
        assert torch.equal(embedding[ids[token]], model.lm_head.weight[known[token]]), token
    assert set(trainer.progress.levels.values()) == {3}
    tiny_hf().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another architecture"):
        Trainer(Settings(start=str(tmp_path / "other")), tmp_path / "none.pt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"level must be in 1..5"):
        Trainer(Settings(level=6), tmp_path / "none.pt", tmp_path / "out")


def test_each_stage_trains_what_it_is_for(tmp_path):
    """Reading leaves the tower alone, seeing the decoder; together moves both."""
    trainer = Trainer(Settings(images=5, questions=2, weight_decay=0.0), tmp_path / "state.pt", tmp_path / "out")
    parts = {
        "tower": trainer.model.model.visual.blocks[0].mlp.fc1.weight,
        "decoder": trainer.model.model.language_model.layers[0].mlp.up_proj.weight,
    }
    for stage, moved in (("reading", {"decoder"}), ("seeing", {"tower"}), ("together", {"tower", "decoder"})):
        trainer.optimizer.zero_grad(set_to_none=True)
        before = {name: weight.detach().clone() for name, weight in parts.items()}
        trainer.step(stage)
        assert {name for name, weight in parts.items() if not torch.equal(weight, before[name])} == moved, stage


# ---- the checkpoint ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(items):
    return evaluate(items)


def test_checkpoint_answers_as_its_card_says(measured):
    """Within three standard errors of a sample of this size."""
    card = _card_accuracy()
    for category, group in measured.groupby("category"):
        expected = card[category]
        error = np.sqrt(max(expected * (1 - expected), 0.01) / len(group))
        assert abs(group.right.mean() - expected) < 3 * error, category


def test_checkpoint_looks_at_the_image(items, measured):
    blind, prior = evaluate(items, blind=True), np.mean(best_without_image(items, 2000))
    assert blind.right.mean() < prior + 0.05
    assert measured.right.mean() > blind.right.mean() + 0.15


def test_generate_gives_what_was_measured(items, measured, tokenizer):
    model = Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    for item, right in list(zip(items, measured.right))[:8]:
        content = [{"type": "image"}, {"type": "text", "text": item.question}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True).replace(
            "<|image_pad|>", "<|image_pad|>" * (item.grid[0] * item.grid[1])
        )
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        written = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8,
            mm_token_type_ids=(tokens == model.config.image_token_id).int(),
            **processor(images=[item.image], return_tensors="pt"),
        )  # fmt: skip
        answer = tokenizer.decode(written[0, tokens.shape[1] :])
        assert (answer == item.answer + "<|im_end|>") == right


def _card_accuracy() -> dict[str, float]:
    lines = (Path(CHECKPOINT) / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: float(row[2]) for row in cells if row[0] in MARKS and len(row) == 6}
