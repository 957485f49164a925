"""Probes: planted labels are read, shuffled ones are not, and features are those of the cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from analyses.data.examples import examples
from analyses.probes import ProbeData, Probes, fit_probes, probe_data, sparse_probe, things
from hooked_qwen2vl import cache_image


@pytest.fixture(scope="module")
def planted():
    """160 items of 80 images: one site holds the label in two directions, the other knows nothing."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["red", "blue", "green"], 160)
    noise = torch.from_numpy(rng.normal(size=(2, 160, 12))).float()
    told = noise[0].clone()
    told[:, 3] += torch.tensor([3.0 * (label == "red") for label in labels])
    told[:, 5] += torch.tensor([3.0 * (label == "blue") for label in labels])
    return ProbeData({"told": told, "blind": noise[1]}, tuple(labels), tuple(str(n // 2) for n in range(160)), "planted")


def test_planted_labels_are_read_and_shuffled_ones_are_not(planted, tmp_path):
    result = fit_probes(planted, progress=False)
    table = result.table.set_index("site")
    assert table.loc["told", "accuracy"] > 0.8 and table.loc["told", "selectivity"] > 0.3
    assert table.loc["blind", "accuracy_low"] < 0.45 and abs(table.loc["blind", "selectivity"]) < 0.25
    direction = result.direction("told", "red", "blue")
    assert direction.abs().argsort(descending=True)[:2].tolist() in ([3, 5], [5, 3]) and direction[3] > 0 > direction[5]
    assert abs(float(direction.norm()) - 1) < 1e-5
    for at, label in enumerate(result.labels):  # towards each label, away from the mean of all others
        weights = result.weights["told"]
        away = weights[at] - sum(weights[n] for n in range(3) if n != at) / 2
        assert torch.allclose(result.direction("told", label), away / away.norm(), atol=1e-6)
    scores = planted.features["told"] @ result.weights["told"].T + result.biases["told"]
    said = np.array(result.labels)[scores.argmax(-1)]
    assert (said == np.array(planted.labels)).mean() > 0.8
    result.plot(tmp_path / "p.png")
    result.save(tmp_path / "r.safetensors")
    assert Probes.load(tmp_path / "r.safetensors").table.equals(result.table)
    sparse = sparse_probe(planted, "told", "red", k=1)
    assert sparse.selected_features.tolist() == [3] and sparse.metrics.accuracy > 0.75


def test_no_image_is_on_both_sides(planted):
    """Items that share an image and its noise: leaking them would read labels that nothing but the image tells."""
    rng = np.random.default_rng(1)
    marks, labels = rng.normal(size=(40, 8)), rng.choice(["a", "b"], 40)
    items = np.repeat(np.arange(40), 4)
    data = ProbeData({"s": torch.from_numpy(marks[items]).float()}, tuple(labels[items]), tuple(map(str, items)), "leak")
    assert fit_probes(data, C=100.0, controls=0, progress=False).table["accuracy"][0] < 0.8
    leaking = replace(data, images=tuple(str(n) for n in range(160)))
    assert (
        fit_probes(leaking, C=100.0, controls=0, progress=False).table["accuracy"][0]
        > fit_probes(data, C=100.0, controls=0, progress=False).table["accuracy"][0]
    )


def test_two_labels_have_the_regressions_own_scores(planted):
    two = replace(planted, labels=tuple("red" if label == "red" else "other" for label in planted.labels))
    result = fit_probes(two, controls=0, progress=False)
    assert result.labels == ("other", "red") and result.direction("told", "red")[3] > 0.5


def test_features_are_those_of_the_cache(scenes):
    data = list(examples("scenes", 2))
    sites = ["blocks.1.hook_resid_pre", ("blocks.2.attn.hook_z", 1), "vision_encoder.blocks.0.hook_resid_post"]
    found = probe_data(scenes, data, sites, things("color"), progress=False)
    assert list(found.features) == ["blocks.1.hook_resid_pre", "blocks.2.attn.hook_z head 1", "vision_encoder.blocks.0.hook_resid_post"]
    first = data[0]
    thing = next(t for t in first.item.scene.things if not t.path)
    inputs = scenes.to_inputs(first.question, images=list(first.images))
    with torch.no_grad():
        _, cache = scenes.run_with_cache(inputs, vision=True)
    places, mask = inputs.positions(tuple(map(float, thing.box))), torch.from_numpy(thing.mask(*first.item.grid))
    assert found.labels[0] == thing.color

    def same(ours, theirs):
        return (ours - theirs).norm() < 1e-5 * theirs.norm()

    assert same(found.features[sites[0]][0], cache["resid_pre", 1][0, places].mean(0))
    assert same(found.features["blocks.2.attn.hook_z head 1"][0], cache["z", 2][0, places, 1].mean(0))
    patches = cache_image(cache, sites[2], inputs)
    rows = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert same(found.features[sites[2]][0], patches[rows].mean(0))
    answers = probe_data(scenes, data, [sites[0]], progress=False)
    assert answers.labels == tuple(example.answer for example in data)


def test_what_is_refused(planted, scenes):
    with pytest.raises(ValueError, match="truth must be one of"):
        things("taste")
    with pytest.raises(ValueError, match="take more data"):
        fit_probes(replace(planted, labels=("red",) * 160), progress=False)
    with pytest.raises(ValueError, match="take more data"):
        fit_probes(planted, test_share=1.0, progress=False)
    with pytest.raises(ValueError, match="expected a site"):
        sparse_probe(planted, "told", "purple")
    with pytest.raises(ValueError, match="expected a site"):
        fit_probes(planted, controls=0, progress=False).direction("nowhere", "red")
    for head in (-1, scenes.cfg.n_heads):
        with pytest.raises(ValueError, match=f"has no head {head}"):
            probe_data(scenes, list(examples("scenes", 1)), [("blocks.2.attn.hook_z", head)], progress=False)
    with pytest.raises(ValueError, match="nothing to probe"):
        probe_data(scenes, [], progress=False)
