"""Features judged against the truth: AUROC by scikit-learn, planted ones are found, chance is not."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from analyses.data.examples import examples
from analyses.dictionaries import Dictionary, load_dictionary
from analyses.experiments.features import FeatureJudgement, aurocs, image_activations, judge_features, shuffled_batches
from hooked_qwen2vl.scenes import CHECKPOINT, DICTIONARY


def test_aurocs_are_scikit_learns():
    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 4, (50, 6)).astype(float), rng.random(50) < 0.3
    assert np.allclose(aurocs(values, positive), [roc_auc_score(positive, column) for column in values.T])


def test_batches_hold_each_row_once_a_pass():
    rows = torch.arange(10.0)[:, None]
    drawn = torch.cat(list(shuffled_batches(rows, 5, 4)))[:, 0]
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))


def test_features_of_the_stream_itself(scenes, tmp_path):
    """A dictionary whose features are the stream's dimensions is as good as the best dimension, no better."""
    d_model = scenes.cfg.d_model
    eye = torch.eye(d_model)
    plain = Dictionary("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre", eye, torch.full((d_model,), 100.0), eye, torch.zeros(d_model))
    data = list(examples("scenes", 24))
    result = judge_features(scenes, plain, data, 1, progress=False)
    table = result.table.pivot_table(index=["truth", "label"], columns="unit", values="which")
    assert (table["feature"] == table["dimension"]).all() and (result.table["unit"].value_counts() == len(table)).all()
    assert set(result.summary()["truth"]) <= {"color", "kind", "size", "row", "col"}
    result.plot(tmp_path / "f.png")
    result.save(tmp_path / "r.safetensors")
    assert FeatureJudgement.load(tmp_path / "r.safetensors").table.equals(result.table)
    rows = image_activations(scenes, data[:2], plain.hook)
    n = sum(len(scenes.to_inputs(e.question, images=list(e.images)).positions("image")) for e in data[:2])
    assert rows.shape == (n, d_model) or len({id(e.images[0]) for e in data[:2]}) < 2


def test_the_shipped_dictionary_is_what_its_card_says(scenes):
    """It belongs to the checkpoint beside it, explains other pictures' image tokens, and single features are colours."""
    card = (DICTIONARY / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest() in card, "train it again"
    dictionary, data = load_dictionary(DICTIONARY), list(examples("scenes", 90))
    rows = image_activations(scenes, data[:20], dictionary.hook)
    left = (dictionary.decode(dictionary.encode(rows), rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert left < 0.05
    summary = judge_features(scenes, dictionary, data, 4, progress=False).summary().set_index("truth")
    assert summary.loc["color", "feature"] == pytest.approx(1.0, abs=0.05)
