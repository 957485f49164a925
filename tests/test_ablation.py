"""Ablation over a data set: by hand, in a folder, planted heads found, and the command."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from analyses.cli import main
from analyses.data.examples import examples
from analyses.experiments.ablation import (
    Ablation,
    AblationEffects,
    HeadSet,
    answer_log_probs,
    every_part,
    find_heads,
    reference_of,
    sets_of_heads,
)
from analyses.interventions import ablate
from hooked_qwen2vl.scenes.words import COLORS, DIGITS, SHAPES


@pytest.fixture(scope="module")
def data():
    return list(examples("scenes", 6))


def test_effects_are_those_of_edited_weights(scenes, data, tmp_path):
    parts = {name: part for name, part in every_part(scenes, "heads").items() if name in ("L0H0", "L2H1", "L3H2")}
    result = Ablation(scenes, parts).run(data, batch_size=3, progress=False)
    assert len(result.table) == 3 * len(data)
    edited = copy.deepcopy(scenes)
    with torch.no_grad():
        edited.blocks[2].attn.W_O[1] = 0
    for example in data[:3]:
        inputs = scenes.to_inputs(example.question, images=list(example.images), answers=example.answer)
        places = inputs.positions("answer")
        for model, column in ((edited, "log_prob"), (scenes, "base_log_prob")):
            with torch.no_grad():
                log_probs = model(inputs)[0, places - 1].float().log_softmax(-1)
            expected = float(log_probs.gather(-1, inputs.tokens[0, places][:, None]).sum())
            row = result.table[(result.table["id"] == example.id) & (result.table["part"] == "L2H1")].iloc[0]
            assert abs(row[column] - expected) < 1e-4
    there = Ablation(scenes, parts).run(data, tmp_path / "run", batch_size=3, progress=False)
    assert np.allclose(there.table["log_prob"], result.table["log_prob"], atol=1e-5) and list(there.table["part"]) == list(
        result.table["part"]
    )
    summary = result.to_dataframe(resamples=50)
    alone = summary[summary["category"] == "all"]
    assert alone["change"].is_monotonic_increasing and (alone["items"] == len(data)).all()
    result.save(tmp_path / "r.safetensors")
    assert AblationEffects.load(tmp_path / "r.safetensors").table.equals(result.table)
    with pytest.raises(ValueError, match="other settings|settings"):
        Ablation(scenes, every_part(scenes, "mlps")).run(data, tmp_path / "run", batch_size=3, progress=False)


def test_planted_heads_are_found(scenes, data):
    """Where all heads but three write nothing, one of the three is found first, with the share that edited weights give."""
    planted = {(0, 0), (1, 1), (3, 2)}
    model = copy.deepcopy(scenes)
    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                if (layer, head) not in planted:
                    model.blocks[layer].attn.W_O[head] = 0
    whole, every = [], [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    words = [*COLORS, *SHAPES, *DIGITS, "yes", "no"]
    for example in examples("scenes", 8):  # the answers are those that its heads bring most
        inputs = model.to_inputs([example.question] * len(words), images=[list(example.images)] * len(words), answers=words)
        brought = answer_log_probs(model, inputs)[0] - answer_log_probs(model, inputs, ablate(heads=every))[0]
        whole.append(replace(example, answer=words[int(brought.argmax())]))
    found = find_heads(model, whole[:4], whole[4:], 1.0, "zero", most=3, n_random=6, progress=False, candidates=4)
    assert isinstance(found, HeadSet) and found.heads[0] in planted
    shares = [0.0, *found.search["share"]]
    for head, before, after in zip(found.heads, shares, shares[1:]):
        assert head in planted or abs(after - before) < 1e-4  # what writes nothing carries nothing
    alone, none = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            none.blocks[layer].attn.W_O[:] = 0
            for head in range(model.cfg.n_heads):
                if (layer, head) != found.heads[0]:
                    alone.blocks[layer].attn.W_O[head] = 0
    means = []
    for one in (none, alone, model):
        asked = [one.to_inputs(e.question, images=list(e.images), answers=e.answer) for e in whole[:4]]
        means.append(sum(float(answer_log_probs(one, inputs)[0]) for inputs in asked))
    assert abs(shares[1] - (means[1] - means[0]) / (means[2] - means[0])) < 1e-3
    assert list(found.held_out["set"]) == ["found", *(f"random {n}" for n in range(6))]


def test_the_reference_holds_every_token(scenes):
    reference = reference_of(scenes, limit=3, kind="mlps")
    assert set(reference) == {f"blocks.{layer}.hook_mlp_out" for layer in range(scenes.cfg.n_layers)}
    total = 0
    for example in examples("scenes:train", 3):
        inputs = scenes.to_inputs(example.question, images=list(example.images), answers=example.answer)
        total += inputs.shape[1]
    assert all(values.shape == (1, total, scenes.cfg.d_model) for values in reference.values())


def test_what_is_refused(scenes, data):
    with pytest.raises(ValueError, match="kind must be one of"):
        every_part(scenes, "neurons")
    for heads in ([], [(0, 0), (0, 0)], [(99, 0)]):
        with pytest.raises(ValueError, match="expected heads"):
            sets_of_heads(scenes, heads)
    with pytest.raises(ValueError, match="both in the search and held out"):
        find_heads(scenes, data[:1], data[:1])
    with pytest.raises(ValueError, match="a share in 0..1"):
        find_heads(scenes, data[:1], data[1:], 2.0)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = str(tmp_path)
    assert main(["ablate", "--limit", "4", "--parts", "mlps", "--out", out]) == 0
    manifest = json.loads((tmp_path / "ablate.json").read_text())
    assert set(manifest["files"]) == {"ablation.csv", "ablation.png", "failures.csv", "index.html"}
    assert main(["ablate", "--limit", "8", "--find", "--share", "0.3", "--random", "3", "--out", str(tmp_path / "find")]) == 0
    assert "heads carry" in capsys.readouterr().out


def test_the_command_refuses(capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    assert main(["ablate", "--find", "--heads", "1.1", *out]) == 2 and "one of them" in capsys.readouterr().err
    assert main(["ablate", "--share", "2", *out]) == 2 and "--share" in capsys.readouterr().err
    for apart in (["--dry-run"], ["--cluster", "auto"]):
        assert main(["ablate", "--find", *apart, *out]) == 2 and "one process" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ablate", "--heads", "1-1", *out])
    assert "layer.head" in capsys.readouterr().err
