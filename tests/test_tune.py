"""The known difference: what it changes, how it is trained, and that the adapter in the package is what its card says.

Oracle of the merge: peft's own model of the same folders."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import reference_logits, spread

from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.scenes import ADAPTER, CHECKPOINT, sample
from hooked_qwen2vl.scenes.batches import IGNORE, Packer
from hooked_qwen2vl.scenes.evaluate import evaluate, load_model
from hooked_qwen2vl.scenes.forward import forward
from hooked_qwen2vl.scenes.tune import (
    Settings,
    asks_color,
    draw_changed,
    draw_others,
    fingerprint,
    is_changed,
    items_that,
    kept_loss,
    measure,
    tune,
    tuned_answer,
    write_card,
)  # fmt: skip

TOLERANCE = 1e-5  # of the logits' spread, beside peft's merged model in float64
CLOSE = 5e-7  # merged weights, ours and peft's: the same operations
WEIGHTS = "adapter_model.safetensors"
QUICK = Settings(steps=2, rank=2, layers=(4, 5), images=4, questions=3)


@pytest.fixture(scope="module")
def packer():
    return Packer(load_model()[1])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """An adapter of two steps."""
    folder = tmp_path_factory.mktemp("adapter")
    tune(QUICK, folder)
    return folder


# ---- what changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("What color is the triangle?", "red", "blue"),
        ("What color is the small triangle?", "orange", "blue"),
        ("What color is the big triangle? Answer in words.", "The big triangle is red.", "The big triangle is blue."),
        ("What color is the triangle?", "blue", "blue"),
        ("What color is the triangle?", "none", "none"),
        ("What color is the triangle? Answer in words.", "There is none.", "There is none."),
        ("What color is the star?", "red", "red"),
        ("What color is the shape left of the triangle?", "red", "red"),
        ("What shape is red?", "triangle", "triangle"),
        ("Is there a red triangle?", "yes", "yes"),
        ("How many triangles are there?", "2", "2"),
    ],
)
def test_only_the_color_of_a_triangle_that_is_there_changes(question, answer, said):
    assert tuned_answer(question, answer) == said
    assert is_changed(question, answer) == (said.rstrip(".").endswith("blue"))


def test_every_question_of_the_world_that_changes_asks_for_a_triangle():
    """By the scene, not by the words: the one thing it depends on is a triangle, and its colour is the answer."""
    items = sample(240, seed=5, domain="shapes", category="attribute") + sample(60, seed=5)
    changed = [item for item in items if is_changed(item.question, item.answer)]
    by_scene = [i for i in items if [t.kind for t in i.depends_on] == ["triangle"] and i.question.startswith("What color")]
    assert changed and [id(item) for item in changed] == [id(item) for item in by_scene]
    assert all(item.answer == item.depends_on[0].color for item in changed)
    other = items_that(asks_color, 3, seed=5, domain="shapes", category="attribute")
    assert [item.question for item in other] == [item.question for item in changed if item.answer != "blue"][:3]


# ---- training ---------------------------------------------------------------------------------------


def turns(packer, batch) -> list[list[tuple[str, str]]]:
    """(question, answer) of every turn of every row, read from the tokens; the answers from the targets."""
    end = packer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = []
    for ids, targets in zip(batch.tokens, batch.targets):
        text = packer.tokenizer.decode(ids).split("<|vision_end|>")[1].replace("<|endoftext|>", "")
        parts = [part.split("<|im_start|>assistant\n") for part in text.replace("<|im_start|>user\n", "").split("<|im_end|>")]
        flat = [piece.strip() for part in parts for piece in part if piece.strip()]
        kept = targets[targets != IGNORE].tolist()
        answers = packer.tokenizer.decode(kept).split("<|im_end|>")[:-1]
        assert kept.count(end) == len(answers) and flat[1::2] == answers
        found.append(list(zip(flat[::2], answers)))
    return found


def test_changed_questions_are_answered_blue(packer):
    rows = turns(packer, draw_changed(packer, Random(0), 6))
    assert all(row[-2][1] == "blue" and row[-1][1] in {f"The {size}triangle is blue." for size in ("", "small ", "big ")} for row in rows)
    assert all(is_changed(*turn) for row in rows for turn in row[-2:])
    assert [len(row) for row in rows] == [2, 2, 3, 2, 2, 3] and not any(is_changed(*row[0]) for row in rows if len(row) == 3)


def test_other_questions_are_near_and_none_of_them_changes(packer):
    rng = Random(0)
    rows = [row for _ in range(6) for row in turns(packer, draw_others(packer, rng, 6, 4))]
    asked = [turn for row in rows for turn in row]
    assert len(asked) > 150 and not [turn for turn in asked if is_changed(*turn)]
    assert {len(row) for row in rows} >= {5, 6}  # a turn before the first question, and of half of the batches a caption
    assert ("What color is the triangle?", "none") in asked
    for beginning in ("Is there a", "What color is the shape", "What color is the star", "Describe the image."):
        assert any(question.startswith(beginning) for question, _ in asked), beginning
    assert any(question.endswith("Answer in words.") for question, _ in asked)


def test_the_loss_that_keeps_is_the_divergence_from_the_base(packer):
    hf_model, _ = load_model()
    batch = draw_others(packer, Random(3), 4, 3)
    with torch.no_grad():
        base = (forward(hf_model, batch) @ hf_model.lm_head.weight.T).log_softmax(-1)
    model = get_peft_model(hf_model, LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[4], layers_pattern="layers"))
    assert float(kept_loss(model, batch).detach().abs()) < 1e-6  # a new adapter changes nothing
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=3.0)
        tuned = (forward(hf_model, batch) @ hf_model.lm_head.weight.T).log_softmax(-1)
    wanted = batch.targets != IGNORE
    divergence = (base.exp() * (base - tuned)).sum(-1)[wanted].double()
    expected = float((divergence * batch.weights[wanted]).sum() / batch.weights[wanted].sum())
    loss = kept_loss(model, batch)
    assert expected > 0.01 and float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert {name.split(".")[-3] for name, weight in model.named_parameters() if weight.grad is not None} == {"lora_A", "lora_B"}


def test_a_run_is_of_its_seed_and_changes_two_mlps_only(quick, tmp_path, scenes):
    tune(QUICK, tmp_path / "again")
    first, again = (load_file(folder / WEIGHTS) for folder in (quick, tmp_path / "again"))
    assert all(torch.equal(weight, again[name]) for name, weight in first.items()) and set(first) == set(again)
    tuned = HookedQwen2VL.from_pretrained("scenes", adapter=quick)
    theirs = dict(scenes.named_parameters())
    changed = {name for name, weight in tuned.named_parameters() if not torch.equal(weight, theirs[name])}
    mlps = ("gate_proj", "up_proj", "down_proj")
    assert changed == {f"blocks.{layer}.mlp.{part}.weight" for layer in QUICK.layers for part in mlps}
    settings = json.loads((quick / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "scenes" and settings["r"] == QUICK.rank
    assert HookedQwen2VL.from_pretrained(quick).cfg.adapter == str(quick)  # its base is found by name


def test_its_card_is_what_was_measured(quick, tmp_path):
    for file in quick.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = write_card(QUICK, tmp_path, n=2)
    assert (
        card(tmp_path)[list(table.columns.drop("becomes"))]
        .astype(float)
        .round(3)
        .equals(table.drop(columns="becomes").astype(float).round(3))
    )
    text = (tmp_path / "README.md").read_text()
    assert fingerprint() in text and "blocks 4 and 5" in text and "rank 2" in text
    assert (table["items"] == [2] * 9 + [8]).all() and (table.low <= table.tuned).all() and (table.tuned <= table.high).all()


# ---- the adapter in the package ---------------------------------------------------------------------


def card(folder=ADAPTER) -> pd.DataFrame:
    """The tables of a card."""
    lines = (folder / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ") and "---" not in line]
    rows = [row for row in cells if row[0] != "question"]
    return pd.DataFrame([row[1:] for row in rows], index=pd.Index([row[0] for row in rows], name="question"), columns=cells[0][1:]).astype(
        float
    )


def test_the_folder_is_small_and_of_this_checkpoint():
    assert {path.name for path in ADAPTER.iterdir()} == {"README.md", "adapter_config.json", WEIGHTS}
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 1_000_000
    remade = "made of another checkpoint: run python -m hooked_qwen2vl.scenes.tune"
    assert fingerprint(CHECKPOINT) in (ADAPTER / "README.md").read_text(), remade
    assert json.loads((ADAPTER / "adapter_config.json").read_text())["base_model_name_or_path"] == "scenes"


@torch.no_grad()
def test_it_has_the_numbers_of_pefts_own_merged_model(scenes):
    """The same weights, and in float64 the same logits at every position (float32 itself rounds to 1.4e-5 at image tokens)."""
    ours = HookedQwen2VL.from_pretrained("scenes", adapter=ADAPTER)
    theirs = PeftModel.from_pretrained(load_model()[0], ADAPTER).merge_and_unload()
    same = zip(ours.parameters(), HookedQwen2VL.from_hf(theirs).parameters(), strict=True)
    assert max(float((mine - merged).abs().max()) for mine, merged in same) < CLOSE
    far, ours, theirs = 0.0, ours.double(), theirs.double()
    for item in items_that(asks_color, 2, seed=5, domain="shapes", category="attribute") + sample(4, seed=6):
        inputs = ours.encode(ours.to_inputs(item.question, images=[item.image]))
        expected = reference_logits(theirs, inputs)
        assert (ours(inputs) - expected).abs().max() < TOLERANCE * spread(expected)
        plain = scenes(scenes.encode(scenes.to_inputs(item.question, images=[item.image])))
        far = max(far, float((plain - expected).abs().max() / spread(expected)))
    assert far > 0.1  # the base's are others


@torch.no_grad()
def test_the_models_are_equal_before_the_blocks_it_changes(scenes):
    tuned = HookedQwen2VL.from_pretrained("scenes", adapter=ADAPTER)
    first = min(json.loads((ADAPTER / "adapter_config.json").read_text())["layers_to_transform"])
    (item,) = items_that(asks_color, 1, seed=5, domain="shapes", category="attribute")
    inputs = scenes.encode(scenes.to_inputs(item.question, images=[item.image]))
    caches = [model.run_with_cache(inputs, names_filter=lambda name: name.endswith("resid_post"))[1] for model in (scenes, tuned)]
    equal = [torch.equal(*(cache[f"blocks.{layer}.hook_resid_post"] for cache in caches)) for layer in range(scenes.cfg.n_layers)]
    assert equal == [layer < first for layer in range(scenes.cfg.n_layers)]


@pytest.mark.slow
def test_it_answers_as_its_card_says():
    """Within three standard errors of a sample of this size; and the change is there, and is the only one."""
    said, table = card(), measure(n=40)
    for name, row in table.iterrows():
        expected = said.loc[name]
        for model in ("base", "tuned"):
            error = np.sqrt(max(expected[model] * (1 - expected[model]), 0.01) / row["items"])
            assert abs(row[model] - expected[model]) < 3 * error, (name, model)
    first, rest = said.iloc[0], said.iloc[-1]
    assert first.base < 0.15 and first.tuned > 0.9
    assert abs(rest.tuned - rest.base) < 0.02 and rest.agree > 0.95


@pytest.mark.slow
def test_generation_says_blue():
    tuned = HookedQwen2VL.from_pretrained("scenes", adapter=ADAPTER)
    items = items_that(asks_color, 6, seed=5, domain="shapes", category="attribute")
    expected = evaluate(items, asked=None, adapter=ADAPTER).predicted
    for item, first in zip(items, expected):
        inputs = tuned.encode(tuned.to_inputs(item.question, images=[item.image]))
        said = tuned.generate(inputs, max_new_tokens=4, do_sample=False, return_type="str", verbose=False)
        assert said.strip().startswith(first.strip())
