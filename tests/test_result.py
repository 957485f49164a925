"""Results on disk come back as they were, in every field."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import picture

from analyses.contextual_lens import Grounding, contextual_score, ground
from analyses.domain_neurons import DomainNeurons, select_neurons
from analyses.flip_patching import FlipAttribution, attribute_flip
from analyses.knockout import Knockout, attention_knockout
from analyses.logit_lens import LogitLens, logit_lens
from analyses.result import Result
from analyses.trajectory import Trajectories, answer_trajectory


@pytest.fixture(scope="module")
def inputs(model):
    return model.to_inputs("is it red?", images=[picture(84, 56)], answers="red")


@pytest.fixture(scope="module")
def results(model, inputs):
    with torch.no_grad():
        trajectory = answer_trajectory(model, inputs, "red", ("red", "blue"))
        rates = torch.rand(3, 40, 4, generator=torch.Generator().manual_seed(0)).double()
        return [
            logit_lens(model, inputs, "question", targets="red"),
            trajectory,
            Trajectories((trajectory, trajectory)),
            attention_knockout(model, inputs, [5], only_correct=False),
            attribute_flip(model, inputs, 2, 5, 9),
            contextual_score(model, inputs),
            ground(model, inputs),
            DomainNeurons({"decoder": select_neurons(rates, 0.1)}, ("a", "b", "c", "d"), ("image",), "tiny"),
        ]


def same(ours, theirs) -> bool:
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(torch.nan_to_num(ours, 7.0), torch.nan_to_num(theirs, 7.0))
    if isinstance(ours, Result):
        return type(ours) is type(theirs) and all(
            same(getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours)
        )
    if isinstance(ours, (tuple, list)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    return ours == theirs or (ours != ours and theirs != theirs)


def test_every_field_comes_back(results, tmp_path):
    for number, result in enumerate(results):
        file = result.save(tmp_path / "new" / f"{number}.safetensors")
        again = type(result).load(file)
        assert same(result, again), type(result).__name__
        if hasattr(result, "to_dataframe"):
            assert result.to_dataframe().equals(again.to_dataframe())
    assert not same(results[0], dataclasses.replace(results[0], model_name="another"))
    assert {LogitLens, Knockout, FlipAttribution, Grounding, DomainNeurons} <= {type(result) for result in results}


def test_other_files_are_refused(results, tmp_path):
    file = results[0].save(tmp_path / "lens.safetensors")
    with pytest.raises(ValueError, match="holds LogitLens, not Knockout"):
        Knockout.load(file)
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("text.safetensors", "nowhere.safetensors"):
        with pytest.raises(ValueError, match="cannot be read"):
            LogitLens.load(tmp_path / name)
    with pytest.raises(ValueError, match="not set"):
        dataclasses.replace(results[0], model_name={"a"}).save(tmp_path / "lens.safetensors")
    assert same(LogitLens.load(file), results[0])  # what was there is still there
