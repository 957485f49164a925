"""Saliency against brute force: hand-made knockouts, new pixels, full matrix products, and the theorems of the methods."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import picture
from tiny import tiny_hf, tiny_processor3

from analyses.cli import explain, main
from analyses.experiments.saliency import SaliencyRun
from analyses.knockout import knockout_hooks
from analyses.saliency import METHODS, Curves, Saliency, curves, saliency, token_effects
from hooked_qwen2vl import HookedQwen2VL

SAME = 2e-5  # float32, nats
QUIET = {"progress": False}


@pytest.fixture(scope="module", params=["qwen2_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"])
def model(request, processor):
    family = request.param
    return HookedQwen2VL.from_hf(tiny_hf(family=family), tiny_processor3() if family == "qwen3_vl" else processor)


@pytest.fixture(scope="module")
def prompt(model):
    """Two images and an answer of several tokens, as the second row of a padded batch."""
    pictures = [picture(64, 96, 1), picture(64, 64, 2)]
    return model.to_inputs(["what is this, then?", "is it?"], images=[[pictures[1]], pictures], answers=["red", "red or"])


@torch.no_grad()
def log_probs(model, inputs, hooks=()):
    """[answer] of one row, from the whole run."""
    places = inputs.positions("answer")
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks)[0, places - 1]
    return logits.log_softmax(-1).gather(-1, inputs.tokens[0, places][:, None])[:, 0].double()


def test_the_knockout_by_hand(model, prompt):
    item = prompt[1]
    base, image = log_probs(model, item), item.positions("image").tolist()
    assert len(item.positions("answer")) > 2
    for layers, size in ((None, 5), (None, 1), ([1, 2], 16)):
        ours = token_effects(model, prompt, 1, layers=layers, batch_size=size, **QUIET)
        assert torch.allclose(ours.log_probs, base, atol=SAME)
        for place in (0, 3, len(image) - 1):
            later = range(image[place] + 1, item.shape[1])
            hooks = knockout_hooks(item, [image[place]], later, layers or range(model.cfg.n_layers))
            assert torch.allclose(ours.values[:, place], base - log_probs(model, item, hooks), atol=SAME)
        assert ours.values.std() > 1e-3


def test_boxes_of_the_table_are_the_prompts(model, prompt):
    item = prompt[1]
    table = saliency(model, prompt, "random", 1, **QUIET).to_dataframe()
    for image in range(2):
        rows = table[(table["image"] == image) & (table["answer_token"] == 0)]
        assert torch.allclose(torch.tensor(rows[["x0", "y0", "x1", "y1"]].to_numpy()).float(), item.boxes(image=image).float(), atol=1e-4)


def test_occlusion_by_hand(model, prompt):
    item = prompt[1]
    ours = saliency(model, prompt, "occlusion", 1, batch_size=4, **QUIET)
    base = log_probs(model, item)
    sizes = item.grids.prod(-1).tolist()
    for place in (0, len(item.positions("image")) - 1):
        pixels = item.pixels.clone()
        image = 0 if 4 * place < sizes[0] else 1
        own = pixels.split(sizes)[image]
        colours = own.unflatten(-1, (3, -1)).mean((0, 2))
        pixels[4 * place : 4 * place + 4] = colours[:, None].expand(3, pixels.shape[-1] // 3).flatten()
        assert torch.allclose(ours.values[:, place], base - log_probs(model, replace(item, pixels=pixels)), atol=SAME)


def test_integrated_gradients_are_complete(model, prompt):
    """They sum to the difference between the image and the blank one, answer token by answer token."""
    ours = saliency(model, prompt, "integrated gradients", 1, steps=64, **QUIET)
    blank = curves(model, prompt, ours, "pixels", 1, steps=1).deletion[-1]
    assert abs(float(ours.whole.sum()) - (float(ours.log_probs.sum()) - float(blank.log()))) < 0.02 * max(
        1.0, float(ours.values.abs().sum())
    )
    assert all(weight.grad is None for weight in model.parameters())


def test_rollout_and_relevance_are_matrix_products(model, prompt):
    item = prompt[1]
    patterns, hooks = {}, []

    def keep(pattern, hook):
        patterns[hook.layer()] = pattern
        pattern.retain_grad()

    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(model.cfg.n_layers)]
    reads, image = item.positions("answer") - 1, item.positions("image")
    with torch.enable_grad():
        logits = model.run_with_hooks(item, fwd_hooks=hooks)
        logits[0, reads[1]].log_softmax(-1)[item.tokens[0, reads[1] + 1]].backward()
    eye = torch.eye(item.shape[1], dtype=torch.float64)
    rollout, relevance, attention = eye, eye, 0
    for layer in range(model.cfg.n_layers):
        pattern, grad = (x[0].detach().double() for x in (patterns[layer], patterns[layer].grad))
        rollout = (0.5 * pattern.mean(0) + 0.5 * eye) @ rollout
        relevance = relevance + (pattern * grad).clamp(min=0).mean(0) @ relevance
        attention = attention + pattern.mean(0) / model.cfg.n_layers
    model.zero_grad()
    expected = {"rollout": rollout[reads], "attention × gradient": relevance[reads], "attention": attention[reads]}
    for method, values in expected.items():
        ours = saliency(model, prompt, method, 1, **QUIET)
        assert torch.allclose(ours.values[1], values[1, image], rtol=1e-3, atol=1e-7), method


@pytest.mark.parametrize("by", ["keys", "pixels"])
def test_curves_begin_and_end_where_they_must(model, prompt, by):
    item = prompt[1]
    order = torch.arange(len(item.positions("image")), 0, -1).double()
    ours = curves(model, prompt, order, by, 1, steps=4)
    full = log_probs(model, item).sum().exp()
    deletion, insertion, full = ours.deletion.log(), ours.insertion.log(), full.log()
    assert torch.allclose(deletion[0], full, atol=1e-4) and torch.allclose(insertion[-1], full, atol=1e-4)
    assert torch.allclose(deletion[-1], insertion[0], atol=1e-4) and abs(float(full - deletion[-1])) > 1e-2
    assert ours.shares[0] == 0 and ours.shares[-1] == 1 and len(ours.to_dataframe()) == len(ours.shares)
    if by == "keys":
        gone = item.positions("image")[: int(round(float(ours.shares[2]) * len(order)))]
        hooks = []
        for place in gone.tolist():
            hooks += knockout_hooks(item, [place], range(place + 1, item.shape[1]), range(model.cfg.n_layers))
        assert torch.allclose(ours.deletion[2], log_probs(model, item, hooks).sum().exp(), rtol=1e-4, atol=0)


def test_a_target_instead_of_an_answer(model):
    item = model.to_inputs("is it red?", images=[picture(64, 64, 3)])
    with torch.no_grad():
        expected = model(item)[0, -1].log_softmax(-1)[7]
    ours = saliency(model, item, target=7, **QUIET)
    assert torch.allclose(ours.log_probs, expected.double()[None], atol=SAME) and ours.values.shape == (1, 4)
    assert [tuple(m.shape) for m in ours.maps()] == [(2, 2)]
    for wrong in (-1, model.cfg.d_vocab):
        with pytest.raises(ValueError, match="target must be a token"):
            saliency(model, item, target=wrong, **QUIET)
    again = saliency(model, item, "random", target=7, seed=1, **QUIET)
    assert torch.equal(again.values, saliency(model, item, "random", target=7, seed=1, **QUIET).values)


def test_what_is_refused(model, prompt):
    plain = model.to_inputs("is it red?", images=[picture(64, 64, 3)])
    for call, message in (
        (lambda: saliency(model, prompt, "grad-cam"), "method must be one of"),
        (lambda: saliency(model, plain), "got neither"),
        (lambda: saliency(model, prompt, target=3), "got both"),
        (lambda: saliency(model, "is it red?", target=3), "the prompt has none"),
        (lambda: saliency(model, plain, target=10**6), "target must be a token"),
        (lambda: saliency(model, prompt, "occlusion", layers=[0]), "go with method='knockout'"),
        (lambda: saliency(model, prompt, layers=[0, 2]), "consecutive layers"),
        (lambda: saliency(model, prompt, layers=[99]), "consecutive layers"),
        (lambda: curves(model, prompt, torch.ones(3)), "a value for each of"),
        (lambda: curves(model, prompt, torch.ones(3), by="blur"), "by must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- pictures, the experiment, the command -------------------------------------------------------


def test_an_experiment_in_memory_and_in_a_folder(scenes, tmp_path):
    from analyses.data.examples import examples

    data = list(examples("scenes", 2))
    work = SaliencyRun(scenes, ["knockout", "random"], steps=2)
    result, there = work.run(data, progress=False), work.run(data, tmp_path / "run", progress=False)
    assert result.table.equals(there.table[result.table.columns])
    table = result.to_dataframe(resamples=50)
    assert list(table["method"]) == ["knockout", "random"] and (table["items"] >= 1).all()
    assert float(table.set_index("method").loc["random", "deletion_keys_minus_random"]) == 0
    assert result.plot(tmp_path / "areas.png") and (tmp_path / "areas.png").stat().st_size > 5000


def test_the_command_and_its_pictures(tmp_path, capsys):
    assert explain.METHODS == METHODS[:-1]
    assert main(["explain", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    manifest = json.loads((tmp_path / "explain.json").read_text())
    assert set(manifest["files"]) == {"explain.csv", "explain.png", "explain.html", "index.html"} and manifest["answer"] in said
    page = (tmp_path / "explain.html").read_text()
    assert "{{" not in page.split("<script>")[0] and "http" not in page.replace("http://www.w3.org", "")
    assert main(["explain", "--image", "x.png"]) == 2 and "without a question" in capsys.readouterr().err
    assert main(["explain", "--question", "what?"]) == 2 and "without an image" in capsys.readouterr().err


def test_pictures_of_several_images_and_hostile_tokens(processor, tmp_path):
    model = HookedQwen2VL.from_hf(tiny_hf(), processor)
    prompt = model.to_inputs(["is it?", "is it?"], images=[[], [picture(64, 96, 1), picture(64, 64, 2)]], answers=["red", "red or"])
    result = saliency(model, prompt, "random", 1, **QUIET)
    hostile = replace(result, tokens=("</script>", *result.tokens[1:]), question="<b>&$x$")
    pictures = [picture(64, 96, 1), picture(64, 64, 2)]
    hostile.plot(tmp_path / "a.png", pictures)
    hostile.page(pictures, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert text.count("</script>") == 2 and "&lt;b&gt;&amp;$x$" in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["tokens"][0] == "</script>" and len(data["values"][0]) == result.values.shape[1] and len(data["images"]) == 2
    with pytest.raises(ValueError, match="expected 2 images"):
        result.plot(images=pictures[:1])
    result.save(tmp_path / "r.safetensors")
    assert torch.equal(Saliency.load(tmp_path / "r.safetensors").values, result.values)
    one = curves(model, prompt, result, row=1, steps=2)
    one.save(tmp_path / "c.safetensors")
    assert Curves.load(tmp_path / "c.safetensors").areas == one.areas and one.plot(tmp_path / "c.png")
