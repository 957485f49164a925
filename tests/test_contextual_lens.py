"""The contextual lens against its definition, brute force, and boxes that are known because they are planted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import half_characters
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from every_result import grounding_experiment
from sklearn.metrics import roc_auc_score
from tiny import byte_symbols

from analyses.answer_scores import SCORES, Evidence, all_scores, blank_image, with_images
from analyses.common.models import describe_model
from analyses.common.rectangles import best_rectangle, heaviest_rectangle, integral_image
from analyses.contextual_lens import contextual_score, default_layers, ground, sweep_layers, word_spans, yes_no_score
from analyses.experiments import grounding as grounding_command
from analyses.experiments.grounding import METHODS, OWN_BOX, box_iou, caveat, centre_heat, figures, run_experiment
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main
from hooked_qwen2vl.scenes import CHECKPOINT, sample

EXACT = 1e-12  # float64 cosines on both sides; measured 4e-16
CLOSE = 1e-5  # float32 activations by two routes; measured 2e-7


@pytest.fixture(scope="module")
def answered(model):
    """Two rows: images of different shapes, an answer of several tokens, padding on the first."""
    wide, tall, small = picture(140, 84, 1), picture(60, 115, 2), picture(90, 56, 3)
    return model.to_inputs(["what?", "which of the two is red?"], images=[[wide], [tall, small]], answers=["blue", "red, blue red"])


@pytest.fixture(scope="module")
def streams(model, answered):
    with torch.no_grad():
        _, cache = model.run_with_cache(answered)
    n = model.cfg.n_layers
    return torch.stack([*(cache["resid_pre", l] for l in range(n)), cache["resid_post", n - 1]], dim=1)


def cosine(a, b):
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


# ---- rectangles -------------------------------------------------------------------------------------


def every_rectangle(rows, cols):
    for top in range(rows):
        for left in range(cols):
            for bottom in range(top + 1, rows + 1):
                for right in range(left + 1, cols + 1):
                    yield top, left, bottom, right


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (6, 1), (4, 6), (7, 5)])
def test_the_best_rectangle_is_that_of_brute_force(rows, cols):
    for _ in range(5):
        vectors, target = torch.randn(rows, cols, 9), torch.randn(9)
        scores = {
            (t, l, b, r): cosine(vectors[t:b, l:r].double().reshape(-1, 9).mean(0), target) for t, l, b, r in every_rectangle(rows, cols)
        }
        assert len(scores) == rows * (rows + 1) // 2 * (cols * (cols + 1) // 2)
        box, score = best_rectangle(vectors, target)
        assert box == max(scores, key=scores.get)
        assert abs(score - scores[box]) < EXACT
        heat = torch.randn(rows, cols).double()
        excess = heat - heat.mean()
        sums = {box: float(excess[box[0] : box[2], box[1] : box[3]].sum()) for box in scores}
        found = heaviest_rectangle(heat)
        assert abs(sums[found] - max(sums.values())) < EXACT


def test_the_integral_image_keeps_its_digits():
    """Small sums beside large ones: float32 tables lose them."""
    values = torch.full((40, 40, 1), 1e4) + torch.rand(40, 40, 1)
    table = integral_image(values)
    sums = table[39, 39] - table[38, 39] - table[39, 38] + table[38, 38]
    assert torch.allclose(sums, values[38, 38].double(), rtol=1e-9)
    short = values.cumsum(0).cumsum(1)
    assert not torch.allclose(short[38, 38] - short[37, 38] - short[38, 37] + short[37, 37], values[38, 38], rtol=1e-5)


def test_equal_rectangles_give_the_largest():
    target = torch.tensor([1.0, 0.0])
    vectors = torch.tensor([0.0, 1.0]).repeat(5, 6, 1)
    vectors[1:4, 2:5] = target * 7
    assert best_rectangle(vectors, target) == ((1, 2, 4, 5), 1.0)
    assert best_rectangle(torch.zeros(2, 3, 2), target)[1] == 0.0


def test_bad_grids():
    with pytest.raises(ValueError, match="rows cols d"):
        best_rectangle(torch.randn(3, 4), torch.randn(4))
    with pytest.raises(ValueError, match="zero vector"):
        best_rectangle(torch.randn(3, 4, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="heat map"):
        heaviest_rectangle(torch.randn(3))


# ---- scores -----------------------------------------------------------------------------------------


def test_the_score_by_hand(model, answered, streams):
    for row in range(2):
        places, images = answered.positions("answer", row), answered.positions("image", row)
        for image_layer, text_layer in ((0, 3), (1, 2), (3, 0), (2, 2)):
            mean = streams[row, text_layer, places].mean(0)
            by_hand = [cosine(mean, streams[row, image_layer, n]) for n in images]
            result = contextual_score(model, answered, row, image_layer, text_layer)
            assert torch.allclose(result.similarity[0], torch.tensor(by_hand).double(), atol=CLOSE)
            assert abs(result.score - max(by_hand)) < CLOSE and -1 <= result.score <= 1
    first = contextual_score(model, answered, 1)
    assert (first.image_layer, first.text_layer) == (round(0.5 * 3), round(0.75 * 3))
    assert first.texts == ("red, blue red",)


def test_the_answer_is_averaged_first_and_raw(model, answered, streams):
    """Normalising the tokens before the mean, or taking the best token, is another number."""
    layers = default_layers(model, None, None)
    tokens = streams[1, layers[1], answered.positions("answer", 1)].double()
    images = streams[1, layers[0], answered.positions("image", 1)].double()
    unit = torch.nn.functional.normalize
    score = contextual_score(model, answered, 1).score
    assert abs(score - float((unit(unit(tokens, dim=-1).mean(0), dim=0) @ unit(images, dim=-1).T).max())) > 1e-4
    assert abs(score - float((unit(tokens, dim=-1) @ unit(images, dim=-1).T).max())) > 1e-4


def test_scaling_changes_nothing_and_turning_round_negates(model, answered, streams):
    stack, images = streams[1].clone(), answered.positions("image", 1)
    ours = contextual_score(model, answered, 1, stack=stack)
    scaled = stack * torch.rand(stack.shape[:2])[..., None].mul(50).add(0.1).where(
        torch.isin(torch.arange(stack.shape[1]), images)[:, None], 3.0
    )
    assert torch.allclose(contextual_score(model, answered, 1, stack=scaled).similarity, ours.similarity, atol=CLOSE)
    stack[:, images] *= -1
    assert torch.allclose(contextual_score(model, answered, 1, stack=stack).similarity, -ours.similarity, atol=EXACT)


def test_a_row_of_a_batch_is_the_row_alone(model, answered):
    alone = model.to_inputs("what?", images=[picture(140, 84, 1)], answers="blue")
    assert abs(contextual_score(model, answered, 0).score - contextual_score(model, alone).score) < CLOSE


def test_end_tokens_are_left_out(model, answered):
    item = answered[1]
    ended = item.extend(torch.tensor(model.cfg.special.eos[:1]), torch.tensor([True]))
    assert ended.positions("answer").shape[0] == item.positions("answer").shape[0] + 1
    assert abs(contextual_score(model, ended).score - contextual_score(model, item).score) < CLOSE
    named = contextual_score(model, ended, span=ended.positions("answer").tolist()).score  # positions are taken as they are
    assert abs(named - contextual_score(model, item).score) > 1e-4


def test_every_noun_of_a_caption(model, streams, answered):
    spans = word_spans(model, answered, ["Blue", "red"], 1)
    assert list(spans) == ["Blue", "red", "red (2)"]
    tokens = {name: model.tokenizer.decode(answered.tokens[1, places]).strip(" ") for name, places in spans.items()}
    assert tokens == {"Blue": "blue", "red": "red", "red (2)": "red"} and spans["red"] != spans["red (2)"]
    result = contextual_score(model, answered, 1, span=spans)
    for name, places in spans.items():
        alone = contextual_score(model, answered, 1, span=places)
        assert abs(float(result.scores[result.names.index(name)]) - alone.score) < EXACT
    table = result.to_dataframe()
    best = int(result.similarity[0].argmax())
    assert table.loc[0, ["x0", "y0", "x1", "y1"]].tolist() == result.boxes[best].tolist()
    with pytest.raises(ValueError, match="3 spans"):
        _ = result.score
    with pytest.raises(ValueError, match="no word 'ed'"):
        word_spans(model, answered, ["ed"], 1)


def test_yes_and_no(model):
    image = picture(84, 56)
    yes, no = (model.to_inputs("is the red thing red?", images=[image], answers=a) for a in ("yes", "No"))
    places = list(word_spans(model, yes, ["red"], segment="question").values())
    noun = contextual_score(model, yes, span=places[-1]).score
    assert yes_no_score(model, yes, "red") == noun
    assert abs(yes_no_score(model, no, "red") + noun) < CLOSE
    assert abs(noun - contextual_score(model, yes, span=places[0]).score) > 1e-4
    with pytest.raises(ValueError, match="yes or no"):
        yes_no_score(model, model.to_inputs("red?", images=[image], answers="blue"), "red")


def words_by_bytes(model, inputs, word, part="answer"):
    """Positions of every mention of a word, by the bytes of the tokens: which of them share a byte with it."""
    places, symbols = inputs.positions(part).tolist(), byte_symbols()
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [b for b in range(256) if b not in order]
    parts = [bytes(order[symbols.index(c)] for c in model.tokenizer.convert_ids_to_tokens(int(inputs.tokens[0, p]))) for p in places]
    text, found, at = b"".join(parts), [], 0
    ends = np.cumsum([len(piece) for piece in parts])
    while (at := text.find(word.encode(), at)) >= 0:
        inside = range(at, at + len(word.encode()))
        found.append([p for p, end, piece in zip(places, ends, parts) if set(range(end - len(piece), end)) & set(inside)])
        at += 1
    return found


@pytest.mark.parametrize(
    "answer, word, mentions",
    [
        ("a café there", "café", 1),
        ("𪚥", "𪚥", 1),
        ("𪚥𪚥 and 𪚥", "𪚥", 3),
        ("一只红猫坐在垫子上", "猫", 1),
        ("一只红猫坐在垫子上", "垫子", 1),
        ("一只红猫坐在垫子上", "一只红猫", 1),
        ("猫和猫", "猫", 2),
        ("我的iPhone在这里", "iPhone", 1),
        ("고양이가 있다", "고양이", 1),
        ("แมวสีแดง", "แมว", 1),
        ("the naïve café.", "naïve", 1),
        ("c++ is it", "c++", 1),
        ("it is 5€", "5€", 1),
    ],
)
def test_every_token_of_a_word(answer, word, mentions):
    """Parts of characters too, in scripts with spaces between words and without; against the tokens' bytes."""
    hard = half_characters.model()
    inputs = hard.to_inputs("what?", images=[picture(56, 56)], answers=answer)
    ours = list(word_spans(hard, inputs, [word]).values())
    assert ours == words_by_bytes(hard, inputs, word) and len(ours) == mentions


def test_what_is_no_word_of_its_own():
    hard = half_characters.model()
    for answer, word in (("cafés", "café"), ("a café", "caf"), ("cafe\u0301", "cafe"), ("scatter", "cat"), ("c++11", "c++"), ("猫a", "b")):
        inputs = hard.to_inputs("what?", images=[picture(56, 56)], answers=answer)
        with pytest.raises(ValueError, match="has no word"):
            word_spans(hard, inputs, [word])
    with pytest.raises(ValueError, match="empty one"):
        word_spans(hard, inputs, ["", "a"])


def test_what_is_not_there(model, answered, batches):
    with pytest.raises(ValueError, match="no segment called 'image'"):
        contextual_score(model, model.to_inputs("red?", answers="red"))
    with pytest.raises(ValueError, match="no segment called 'answer'"):
        contextual_score(model, batches["image"])
    with pytest.raises(ValueError, match="0..3"):
        contextual_score(model, answered, image_layer=4)
    with pytest.raises(ValueError, match="no position 10000"):
        contextual_score(model, answered, span=[10_000])
    with pytest.raises(ValueError, match="no row 7"):
        contextual_score(model, answered, row=7)


def test_the_sweep_is_the_score_at_every_pair(model, tmp_path):
    items = [model.to_inputs("what?", images=[picture(84, 56, n)], answers="red" if n % 3 else "blue") for n in range(8)]
    labels = [True, False, True, True, False, False, True, False]
    sweep = sweep_layers(model, iter(items), labels, progress=False)
    for image_layer, text_layer in ((0, 0), (1, 3), (3, 2)):
        scores = [contextual_score(model, x, 0, image_layer, text_layer).score for x in items]
        assert abs(float(sweep.auroc[image_layer, text_layer]) - roc_auc_score(labels, scores)) < EXACT
    assert sweep.auroc[sweep.image_layer, sweep.text_layer] == sweep.auroc.max()
    assert len(sweep.to_dataframe()) == 16
    sweep.plot(tmp_path / "sweep.png")
    with pytest.raises(ValueError, match="right and wrong"):
        sweep_layers(model, items, [True] * 8)
    with pytest.raises(ValueError, match="one label for each"):
        sweep_layers(model, items[:4], labels, progress=False)


# ---- grounding --------------------------------------------------------------------------------------


def test_the_heat_map_by_hand(model, answered, streams):
    result = ground(model, answered, 1)
    places = answered.positions("answer", 1)
    for image, heat in enumerate(result.heat):
        assert heat.shape == answered.grid(1, image)
        expected = [
            max(cosine(streams[1, l, places].mean(0), streams[1, l, n]) for l in range(1, 4))
            for n in answered.positions(f"image[{image}]", 1)
        ]
        assert torch.allclose(heat.flatten(), torch.tensor(expected).double(), atol=CLOSE)
        assert heat.abs().max() <= 1
    stack = streams[1].clone()
    stack[0] = 1.0  # at layer 0 everything is alike, and counts for nothing
    again = ground(model, answered, 1, stack=stack)
    assert all(torch.allclose(a, b, atol=CLOSE) for a, b in zip(again.heat, result.heat))


def test_map_and_box_at_two_different_layers(model, answered, streams):
    """The map is the score's own cosines; the box's cosine is that of its cells' mean vector, by hand."""
    places = answered.positions("answer", 1)
    for image_layer, text_layer in ((1, 3), (3, 1), (0, 2)):
        result = ground(model, answered, 1, image_layer, text_layer)
        mean = streams[1, text_layer, places].mean(0)
        for image, similarity in enumerate(result.similarity):
            vectors = streams[1, image_layer, answered.positions(f"image[{image}]", 1)]
            by_hand = torch.tensor([cosine(mean, vector) for vector in vectors]).double()
            assert torch.allclose(similarity.flatten(), by_hand, atol=CLOSE)
            row0, col0, row1, col1 = result.cells[image]
            inside = vectors.unflatten(0, tuple(similarity.shape))[row0:row1, col0:col1].flatten(0, 1).mean(0)
            assert abs(float(result.box_scores[image]) - cosine(mean, inside)) < CLOSE


def test_the_best_box_is_at_least_the_best_token(model, answered, batches):
    for row in range(2):
        result = ground(model, answered, row)
        score = contextual_score(model, answered, row).score
        assert abs(max(float(s.max()) for s in result.similarity) - score) < EXACT
        for image, similarity in enumerate(result.similarity):
            assert float(result.box_scores[image]) >= float(similarity.max()) - EXACT


def plant(model, inputs, row, image, cells, seed=0):
    """Hooks: in `cells` the image tokens become t + e_n with Σ e_n = 0, so that only the whole box has cosine 1 with t."""
    layers = default_layers(model, None, None)
    grid = inputs.grid(row, image)
    generator = torch.Generator().manual_seed(seed)
    everywhere = torch.randn(*grid, model.cfg.d_model, generator=generator)
    t = torch.randn(model.cfg.d_model, generator=generator)
    inside = everywhere[cells[0] : cells[2], cells[1] : cells[3]]
    inside += t - inside.mean((0, 1))
    positions, answer = inputs.positions(f"image[{image}]", row), inputs.positions("answer", row)

    def image_hook(residual, hook):
        residual[0, positions] = everywhere.flatten(0, 1)
        return residual

    def text_hook(residual, hook):
        residual[0, answer] = 4 * t
        return residual

    return [(f"blocks.{layer}.hook_resid_pre", hook) for layer, hook in zip(layers, (image_hook, text_hook))]


@pytest.mark.parametrize(
    ("size", "cells", "box"),
    [
        ((168, 84), (1, 2, 3, 5), (56, 28, 140, 84)),  # 3×6 tokens of exactly 28 pixels
        ((84, 168), (2, 1, 6, 2), (28, 56, 56, 168)),
        ((300, 150), (0, 3, 2, 4), None),  # resized: tokens are not 28 pixels
    ],
)
def test_a_planted_box_is_found_in_original_pixels(model, size, cells, box):
    inputs = model.to_inputs("where?", images=[picture(*size)], answers="red blue")
    with model.hooks(fwd_hooks=plant(model, inputs, 0, 0, cells)):
        result = ground(model, inputs)
    rows, cols = inputs.grid()
    (width, height), (r0, c0, r1, c1) = size, cells
    expected = (c0 * width / cols, r0 * height / rows, c1 * width / cols, r1 * height / rows)
    assert result.cells == (cells,) and abs(float(result.box_scores[0]) - 1) < CLOSE
    assert result.box == pytest.approx(expected) and (box is None or result.box == pytest.approx(box))
    covered = result.to_dataframe().query("in_box")[["row", "col"]].to_numpy().tolist()
    assert covered == [[r, c] for r in range(r0, r1) for c in range(c0, c1)]


def test_of_two_images_the_right_one(model):
    images = [picture(140, 84, 1), picture(84, 168, 2)]
    inputs = model.to_inputs("where?", images=images, answers="red")
    for image, cells in ((0, (0, 1, 2, 4)), (1, (3, 0, 5, 2))):
        with model.hooks(fwd_hooks=plant(model, inputs, 0, image, cells)):
            result = ground(model, inputs)
        assert result.image == image and result.cells[image] == cells
        width, height = images[image].size
        assert result.sizes[image] == (width, height)


def test_the_pictures(model, answered, tmp_path):
    result = ground(model, answered, 1)
    result.plot(tmp_path / "a.png", [picture(60, 115, 2), picture(90, 56, 3)], truth=[(0, 0, 20, 30)])
    result.plot(tmp_path / "b.png")
    contextual_score(model, answered, 1, span=word_spans(model, answered, ["red"], 1)).plot(tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 0 for name in "abc")
    with pytest.raises(ValueError, match="2 images"):
        result.plot(images=[picture(60, 115, 2)])


# ---- rival scores -----------------------------------------------------------------------------------


def test_output_scores_by_hand(model, answered):
    with torch.no_grad():
        log_probs = model(answered).log_softmax(-1)
    for row in range(2):
        places = answered.positions("answer", row)
        taken = log_probs[row, places - 1].gather(-1, answered.tokens[row, places][:, None]).double()
        entropy = -(log_probs[row, places - 1].exp() * log_probs[row, places - 1]).sum(-1).mean()
        assert SCORES["probability"](model, answered, row) == pytest.approx(float(taken.sum().exp()), rel=1e-4)
        assert SCORES["mean_log_prob"](model, answered, row) == pytest.approx(float(taken.mean()), rel=1e-5)
        assert SCORES["neg_entropy"](model, answered, row) == pytest.approx(-float(entropy), rel=1e-5)


def test_inner_scores_by_hand(model, answered, streams):
    with torch.no_grad():
        _, cache = model.run_with_cache(answered, names_filter=lambda name: name.endswith("hook_pattern"))
        for row in range(2):
            places, images = answered.positions("answer", row), answered.positions("image", row)
            lens = model.unembed(model.ln_final(streams[row]))  # [layer pos d_vocab]
            tokens = answered.tokens[row, places]
            inside = lens[:, images].softmax(-1)[..., tokens].amax((0, 1)).mean()
            assert SCORES["internal_confidence"](model, answered, row) == pytest.approx(float(inside), rel=1e-4)
            seen = torch.stack([cache["pattern", l][row][:, places - 1][..., images].sum(-1) for l in range(3)]).mean()
            assert SCORES["attention_on_image"](model, answered, row) == pytest.approx(float(seen), rel=1e-4)
            top = lens[:, int(places[0]) - 1].argmax(-1).tolist()
            changes = sum(a != b for a, b in zip(top, top[1:]))
            settled = max((l for l in range(4) if top[l] != top[-1]), default=-1) + 1
            assert SCORES["neg_flips"](model, answered, row) == -changes
            assert SCORES["neg_stability"](model, answered, row) == pytest.approx(-settled / 3)
            over = []
            for p in places - 1:
                probs = lens[1:, p].softmax(-1)
                over.append(-(probs * probs.log()).sum(-1).mean() * len(set(probs.argmax(-1).tolist())) / 3)
            assert SCORES["neg_overthinking"](model, answered, row) == pytest.approx(-float(sum(over) / len(over)), rel=1e-4)


def test_doubt(model):
    """On made lenses: the top token and its probability at each layer; the answer, "red", is second where it is not first."""
    ids = [model.to_single_token(w) for w in ("red", "blue", " red")]
    item = model.to_inputs("what?", images=[picture(56, 56)], answers="red")

    def doubt(tops, rank=1):
        evidence = Evidence(model, item)
        top1, probs = torch.tensor([top for top, _ in tops]), torch.tensor([p for _, p in tops])
        ranks = torch.where(top1 == ids[0], 0, rank)
        evidence.__dict__["lens"] = {name: values[:, None] for name, values in (("top1", top1), ("top1_prob", probs), ("rank", ranks))}
        return -SCORES["neg_doubt"](model, evidence)

    never = [(ids[1], 0.9), (ids[1], 0.8), (ids[1], 0.7)]
    assert doubt(never, rank=5) == 1.0 and doubt(never, rank=4) == pytest.approx(0.9)
    for far in (5, 9):  # before the answer is born nothing counts
        assert doubt([(ids[1], 0.9), (ids[0], 0.8), (ids[0], 0.7)], rank=far) == 0.0
    assert doubt([(ids[0], 0.6), (ids[0], 0.7), (ids[0], 0.9)]) == 0.0
    assert doubt([(ids[0], 0.6), (ids[1], 0.8), (ids[0], 0.9)]) == pytest.approx(0.8)
    assert doubt([(ids[0], 0.6), (ids[2], 0.8), (ids[0], 0.9)]) == 0.0  # only the space differs: the same word
    assert doubt([(ids[0], 0.6), (ids[0], 0.8), (ids[1], 0.9)]) == 0.0  # the last layer is the model's answer, not a doubt


def test_halves_of_characters_are_no_doubt_that_is_shared():
    """Two tokens that both show as � are not the same word: the one was held, the answer begins with the other."""
    hard = half_characters.model()
    item = hard.to_inputs("what?", images=[picture(56, 56)], answers="子")
    own, other = int(item.tokens[0, item.positions("answer")[0]]), hard.tokenizer("𪚥")["input_ids"][0]
    assert hard.tokenizer.decode([own]) == hard.tokenizer.decode([other]) == "\ufffd"
    for top, expected in ((other, -0.75), (own, 0.0)):
        evidence = Evidence(hard, item)
        evidence.__dict__["lens"] = {
            "top1": torch.tensor([[top], [own]]), "top1_prob": torch.tensor([[0.75], [0.5]]), "rank": torch.tensor([[0], [0]])
        }  # fmt: skip
        assert SCORES["neg_doubt"](hard, evidence) == expected


def test_runs_are_shared_and_change_nothing(model, answered, monkeypatch):
    other = model.to_inputs("which of the two is red?", images=[picture(84, 84, 7), picture(56, 84, 8)], answers="red, blue red")
    separate = {name: score(model, Evidence(model, answered, 1, other=other)) for name, score in SCORES.items()}
    runs, blocks = [], model.run_blocks
    monkeypatch.setattr(model, "run_blocks", lambda *a, **k: (runs.append(1), blocks(*a, **k))[1])
    together = all_scores(model, answered, 1, other=other)
    assert len(runs) == 3  # the answer, the blank image, the other image
    assert together == pytest.approx(separate, rel=1e-6)
    assert together["contextual"] == pytest.approx(contextual_score(model, answered, 1).score, abs=CLOSE)
    assert together["contextual_control"] == pytest.approx(contextual_score(model, other).score, abs=CLOSE)
    assert "contextual_control" not in all_scores(model, answered, 1)
    with pytest.raises(ValueError, match="unknown scores luck"):
        all_scores(model, answered, names=["luck"])


def test_blind_is_another_run(model):
    inputs = model.to_inputs("what?", images=[picture(84, 56)], answers="red")
    blank = blank_image(model.encode(inputs))
    assert blank.pixels.abs().max() == 0 and blank.image_embeds is None
    with torch.no_grad():
        p = [float(model(x, logits_at=-2)[0, 0].softmax(-1)[inputs.tokens[0, -1]]) for x in (inputs, blank)]
    assert SCORES["blind_difference"](model, inputs) == pytest.approx(p[0] - p[1], rel=1e-3) and p[0] != p[1]
    assert SCORES["blind_difference"](model, blank) == pytest.approx(0.0, abs=1e-7)
    noise = blank_image(inputs, noise=True)
    assert torch.equal(noise.pixels, blank_image(inputs, noise=True).pixels) and noise.pixels.std() > 0.5


def test_the_control_takes_another_image(model):
    images = [[picture(84, 56, n)] for n in (1, 2)]
    batch = model.to_inputs(["what?", "what?"], images=images, answers=["red", "red"])
    swapped = model.to_inputs("what?", images=images[1], answers="red")
    assert SCORES["contextual_control"](model, batch) == pytest.approx(contextual_score(model, swapped).score, abs=CLOSE)
    with pytest.raises(ValueError, match="another image"):
        SCORES["contextual_control"](model, batch[0])
    with pytest.raises(ValueError, match="grids"):
        with_images(batch[0], model.to_inputs("what?", images=[picture(56, 84)]))


def test_a_noun_turns_the_inner_scores(model):
    image = picture(84, 56)
    yes, no = (model.to_inputs("is the thing red?", images=[image], answers=a) for a in ("yes", "no"))
    names = ["contextual", "internal_confidence"]
    ours, theirs = (all_scores(model, x, names=names, noun="red") for x in (yes, no))
    assert ours["contextual"] == pytest.approx(yes_no_score(model, yes, "red"), abs=CLOSE)
    assert all(ours[name] == pytest.approx(-theirs[name], rel=1e-4) for name in names)
    assert ours["internal_confidence"] > 0


def test_without_an_answer(model, batches):
    for name in ("probability", "contextual", "neg_flips"):
        with pytest.raises(ValueError, match="answer"):
            SCORES[name](model, batches["image"])


# ---- the experiment on the embedded world -----------------------------------------------------------


def test_figures_of_heat_maps_that_are_known():
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:5] = True
    perfect = torch.from_numpy(mask.astype(float))
    assert figures(perfect, mask) == {"pointing": 1.0, "ap": 1.0, "iou": 1.0}
    wrong = figures(-perfect, mask)
    assert wrong["pointing"] == 0.0 and wrong["ap"] < mask.mean() + 0.1 and wrong["iou"] == 0.0
    flat = figures(torch.zeros(4, 6), mask)
    assert flat["pointing"] == flat["ap"] == pytest.approx(6 / 24)
    assert box_iou((1, 2, 3, 4), mask) == pytest.approx(4 / 6)
    assert box_iou((0, 0, 4, 6), mask) == pytest.approx(6 / 24)


def test_the_experiment_runs(model, tmp_path):
    """On a model that knows nothing; what is left out is counted."""
    items = sample(12, seed=3, grid=(4, 6))
    result = run_experiment(model, items, progress=False)
    n = result.table["item"].nunique()
    assert n + sum(result.skipped.values()) == len(items) and n > 2
    assert len(result.table) == n * (len(METHODS) + 1)
    table = result.to_dataframe(resamples=50)
    assert (table.loc[table["category"] == "all", "items"] == n).all()
    known = table.dropna(subset=["ap_low"])
    assert (known["scenes"] > 1).all() and set(known["category"]) == set(table.loc[table["scenes"] > 1, "category"]) < set(
        table["category"]
    )
    assert ((known["ap_low"] <= known["ap"]) & (known["ap"] <= known["ap_high"])).all()
    result.plot(tmp_path / "a.png", "iou")
    with pytest.raises(ValueError, match="no item"):
        run_experiment(model, [item for item in items if item.category == "environment"])


def test_the_shuffled_image_is_another_scenes_of_the_same_grid(model, monkeypatch):
    items = [*sample(5, seed=3, grid=(4, 6)), *sample(5, seed=4, grid=(6, 4)), *sample(2, seed=5, grid=(5, 5))]
    items.append(items[0])  # the same scene twice: no partner for itself
    seen = []

    def watch(model, item, other, *layers):
        seen.append((item, other))
        return heat_maps(model, item, other, *layers)

    heat_maps = grounding_command._heat_maps
    monkeypatch.setattr(grounding_command, "_heat_maps", watch)
    result = run_experiment(model, items, progress=False)
    assert all(item.grid == other.grid and item.scene.key != other.scene.key for item, other in seen)
    usable = [i for i in items if i.answer not in ("no", "0", "none") and 0 < grounding_command.mask_of(i).mean() < 1]
    assert result.skipped.get("says that nothing is there", 0) == sum(i.answer in ("no", "0", "none") for i in items)
    alone = [i for i in usable if not any(o.grid == i.grid and o.scene.key != i.scene.key for o in usable)]
    assert len(seen) == len(usable) - len(alone) and result.skipped.get("no other image of its grid", 0) == len(alone)


def test_which_items_have_a_place_to_find():
    items = sample(80, seed=3)
    kept, skipped = grounding_command._usable(items)
    nothing = [i for i in items if i.answer in ("no", "0", "none")]
    nowhere = [i for i in items if i not in nothing and grounding_command.mask_of(i).mean() in (0, 1)]
    assert nothing and nowhere and kept == [i for i in items if i not in nothing and i not in nowhere]
    assert skipped == {"says that nothing is there": len(nothing), "depends on no cell or on every cell": len(nowhere)}


@pytest.mark.parametrize("rows, cols", [(4, 4), (3, 5), (6, 2)])
def test_the_centre_is_hottest_in_the_middle_by_squared_distance(rows, cols):
    heat = centre_heat(rows, cols)
    for row in range(rows):
        for col in range(cols):
            assert float(heat[row, col]) == pytest.approx(-(((row + 0.5) / rows - 0.5) ** 2) - ((col + 0.5) / cols - 0.5) ** 2)


@pytest.mark.slow
def test_the_experiments_command_writes_what_it_says(tmp_path, capsys):
    written = ["--report", str(tmp_path / "report.md"), "--record", str(tmp_path / "record.json")]
    grounding_command.main(["--n", "12", "--out", str(tmp_path / "out"), *written])
    said = capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"summary.csv", "items.csv", *(f"{figure}.png" for figure in grounding_command.FIGURES)}
    assert (tmp_path / "report.md").read_text(encoding="utf-8").strip() in said and "contextual lens" in said
    items = len(pd.read_csv(tmp_path / "out" / "items.csv")["item"].unique())
    assert items > 2 and json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["items"] == items


def test_the_command(tmp_path, capsys):
    assert main(["ground", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert caveat(HookedQwen2VL.from_pretrained("scenes")) in said
    table = pd.read_csv(tmp_path / "grounding.csv")
    box = table[table["in_box"]]
    corners = ", ".join(f"{v:.0f}" for v in (box["x0"].min(), box["y0"].min(), box["x1"].max(), box["y1"].max()))
    assert f"best box ({corners})" in said and (tmp_path / "grounding.png").stat().st_size > 0
    out = str(tmp_path / "none")
    for wrong in (["--image", "x.png"], ["--question", "what?"], ["--answer", "red", "--text-layer", "99"]):
        assert main(["ground", *wrong, "--out", out]) == 2 and "hooked-qwen2vl: " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_rows_of_a_grounding_lie_where_their_tokens_lie(model):
    """Columns of boxes against the prompt's own geometry: pictures that are not square, of different sizes."""
    inputs = model.to_inputs("which?", images=[picture(150, 84), picture(60, 115)], answers="red")
    found = ground(model, inputs)
    table = found.to_dataframe()
    for image in range(2):
        rows = table[table["image"] == image]
        assert np.allclose(rows[["x0", "y0", "x1", "y1"]], inputs.boxes(image=image), atol=1e-9)
        assert np.allclose(rows["heat"], found.heat[image].flatten()) and np.allclose(rows["cosine"], found.similarity[image].flatten())
        inside = rows[rows["in_box"]]
        box = (inside["x0"].min(), inside["y0"].min(), inside["x1"].max(), inside["y1"].max())
        assert np.allclose(box, found.boxes[image], atol=1e-9)


@pytest.mark.parametrize("cols", [6, 7])
def test_of_equal_rectangles_the_largest_is_taken(cols):
    """A strip of 1×6 and a block of 3×3 fit equally well: area decides, not the sum of the sides; at even and odd widths."""
    vectors = torch.zeros(5, cols, 4)
    vectors[..., 1] = 1.0
    vectors[0, :6], vectors[2:5, cols - 3 :] = torch.eye(4)[0], torch.eye(4)[0]
    cells, score = best_rectangle(vectors, torch.eye(4)[0])
    assert cells == (2, cols - 3, 5, cols) and score == pytest.approx(1.0)


AGAIN = "measure again: the command is at the top of analyses/experiments/grounding.py"


def test_the_caveat_of_ground_says_what_was_measured():
    """The record is of the shipped weights, and its figures are those of docs/grounding_results.md, measured with it."""
    shipped = HookedQwen2VL.from_pretrained("scenes")
    record = json.loads((CHECKPOINT / "grounding.json").read_text(encoding="utf-8"))
    report = (Path(__file__).parents[1] / "docs" / "grounding_results.md").read_text(encoding="utf-8")
    assert record["weights"] == describe_model(shipped)["weights"], AGAIN
    assert f"weights {record['weights']}" in report and f" {record['items']} items;" in report, AGAIN
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith("| all |")]
    for _, _, method, *cells in rows:
        for name, cell in zip(grounding_command.FIGURES, cells):
            reported = [float(number) for number in re.findall(r"[\d.]+", cell)]
            assert record[name].get(method, []) == pytest.approx(reported, abs=6e-4), (method, name, AGAIN)
    said = caveat(shipped)
    mean, low, high = (100 * value for value in record["pointing"]["contextual lens"])
    assert f"over {record['items']} items" in said.lower() and f"depends on in {mean:.0f} % [{low:.0f}–{high:.0f}]" in said
    shipped.W_E.data[5, 3] += 1e-3
    assert caveat(shipped) == ""  # figures of other weights are not said


def test_the_record_is_what_the_experiment_found(model, tmp_path):
    """Planted figures, through the file: means, intervals, and words that follow from them."""
    result = grounding_experiment()
    result.table.loc[result.table["method"] == OWN_BOX, "pointing"] = np.nan
    file = tmp_path / "record.json"
    file.write_text(grounding_command.as_json(result, model), encoding="utf-8")
    written = json.loads(file.read_text(encoding="utf-8"))
    table = result.to_dataframe().query("category == 'all'").set_index("method")
    assert written["items"] == table["items"].max() and written["weights"] == describe_model(model)["weights"]
    for method, recorded in written["pointing"].items():
        assert recorded == pytest.approx(table.loc[method, ["pointing", "pointing_low", "pointing_high"]].tolist(), abs=1e-4)
    assert OWN_BOX in written["iou"] and OWN_BOX not in written["pointing"]  # its box has no hottest token
    for lens, attention, less in (([0.2, 0.1, 0.3], [0.6, 0.5, 0.7], True), ([0.5, 0.4, 0.6], [0.6, 0.5, 0.7], False)):
        written["pointing"] |= {"contextual lens": lens, "attention": attention}
        file.write_text(json.dumps(written), encoding="utf-8")
        assert ("points less well than attention" in caveat(model, file)) == less
    assert caveat(model, tmp_path / "none.json") == ""
