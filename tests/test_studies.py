"""The data-set studies on the embedded model, and their commands."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pandas as pd
import pytest
import torch

from analyses.counterfactuals import check_pairs, scene_candidates
from analyses.data.examples import examples
from analyses.experiments.flips import FlipExperiment, flip_row, flip_study
from analyses.experiments.knockout import knockout_study
from analyses.experiments.locality import SPANS, locality_study
from analyses.flip_patching import ablate_flip, attribute_flip
from analyses.knockout import Knockout
from analyses.trajectory import answer_trajectory
from hooked_qwen2vl.cli import main


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def flips(scenes):
    return flip_study(scenes, examples("scenes", 16), n_random=3, progress=False)


def test_flips_of_a_data_set(scenes, flips):
    table = flips.to_dataframe()
    assert len(flips.prompts) + flips.skipped == 16 and len(table) > 0
    assert (table["attribution_error"] < 1e-5).all()  # every flip: the parts sum to the change
    items, row = [], 0
    for example in examples("scenes", 16):
        inputs = scenes.encode(scenes.to_inputs(example.question, images=list(example.images)))
        item = answer_trajectory(scenes, inputs, example.answer, example.candidates, category=example.category)
        for layer in item.eligible_flips:  # the table's rows, made by hand
            gained, lost = int(item.top1[layer]), int(item.top1[layer - 1])
            test = ablate_flip(scenes, inputs, attribute_flip(scenes, inputs, layer, gained, lost), n_random=3)
            assert test.attribution.before <= 1e-5 and test.attribution.after >= -1e-5
            assert table.loc[row, list(test.summary())].tolist() == list(test.summary().values())
            assert table.loc[row, "final_difference_random"] == pytest.approx(float(test.random[:, 1].mean()))
            assert table.loc[row, ["prompt", "id", "right", "L"]].tolist() == [len(items), example.id, item.right, item.n_layers]
            row += 1
        items.append(item)
    assert row == len(table)
    summary = flips.summary().set_index(["flip is", "by ablating"])
    assert summary.loc[("removed", "found components"), "share"] == table["removed"].mean()
    assert summary.loc[("reversed", "random components"), "share"] == pytest.approx(table["reversed_by_random"].mean())
    assert (flips.summary()["resampled"] == "image").all()
    shift = flips.last_shift()
    assert shift.loc["tv", "mean, as it is"] == pytest.approx(sum(item.last_shift["tv"] for item in items) / len(items))
    assert shift.loc["argmax_changed", "mean, as it is"] == 0


def test_one_flip_and_a_data_set_have_the_same_defaults():
    found = [inspect.signature(f).parameters for f in (ablate_flip, flip_study, FlipExperiment)]
    for name, value in {"n_components": 2, "n_random": 10, "seed": 0}.items():
        assert [parameters[name].default for parameters in found] == [value] * 3, name


def test_an_answer_without_a_first_token_of_its_own_is_left_out(scenes):
    example = next(iter(examples("scenes", 1)))
    assert flip_row(scenes, example, 1, 1, 0, scenes.encode) is not None
    for wrong in (replace(example, answer="\N{SAUROPOD}"), replace(example, answer=" "), replace(example, candidates=())):
        assert flip_row(scenes, wrong, 1, 1, 0, scenes.encode) is None


def test_locality(scenes):
    pairs = check_pairs(scenes, scene_candidates(6, domain="shapes", category="attribute"), n=2, progress=False)
    study = locality_study(scenes, pairs, progress=False)
    assert study.spans.shape == (len(study.hits), scenes.cfg.n_layers, len(SPANS)) and study.early == 3
    # an identity: at layer 0 only the image differs (all of it, a little: the tower's patches see each other)
    assert study.spans[:, 0, 2:].abs().max() < 1e-3
    # and a cell by hand: the changed object's positions at layer 2
    pair, name = pairs.kept[0], "blocks.2.hook_resid_pre"
    source = scenes.run_with_cache(pair.clean, names_filter=name)[1][name]
    places = sorted({*pair.on_boxes.tolist(), *pair.changed.tolist()})

    def put(activation, hook):
        activation[:, places] = source[:, places]
        return activation

    patched = float(pair.metric(scenes.run_with_hooks(pair.corrupted, fwd_hooks=[(name, put)])))
    by_hand = (patched - pair.corrupted_difference) / (pair.clean_difference - pair.corrupted_difference)
    assert float(study.spans[0, 2, 0]) == pytest.approx(by_hand, abs=1e-4) and abs(by_hand) > 0.1
    figures = study.summary()
    assert figures["share"] == sum(study.hits) / len(study.hits) and 0 < figures["chance"] < figures["chance_in_image"] < 1


def test_knockout_of_a_data_set(scenes):
    result = knockout_study(scenes, examples("scenes", 3), progress=False)
    assert result.effects.shape[:2] == (5, scenes.cfg.n_layers) and result.effects.isfinite().all()
    with pytest.raises(ValueError, match="rightly"):
        Knockout.join([])


def test_commands(tmp_path, capsys):
    assert main(["flips", "--limit", "3", "--random", "2", "--out", str(tmp_path / "flips")]) == 0
    assert main(["patch", "--out", str(tmp_path / "patch")]) == 0
    assert main(["knockout", "--limit", "2", "--out", str(tmp_path / "knockout")]) == 0
    said = capsys.readouterr().out
    names = ("flips/flips.csv", "flips/flips.png", "flips/trajectories.png", "patch/patch.csv", "patch/patch.png", "patch/patch_image.png")
    for name in (*names, "knockout/knockout.png"):
        assert str(tmp_path / name) in said and (tmp_path / name).stat().st_size > 0
    table = pd.read_csv(tmp_path / "patch" / "patch.csv")
    assert {"layer", "pos", "metric", "recovery"} <= set(table.columns) and torch.tensor(table["recovery"]).isfinite().all()
    for bad in (["patch", "--image", "a.png"], ["flips", "--image", "a.png"], ["flips", "--limit", "0"], ["patch", "--data", "nowhere"]):
        assert main([*bad, "--out", str(tmp_path)]) == 2
