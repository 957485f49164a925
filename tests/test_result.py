"""Results on disk come back as they were, in every field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from every_result import RESULTS
from PIL import Image

from analyses.counterfactuals import Candidate, Pair, Pairs
from analyses.data.benchmarks import Chair
from analyses.experiments.max_activating import Fired, TopImages
from analyses.knockout import Knockout
from analyses.logit_lens import LogitLens, logit_lens


@pytest.fixture(scope="module")
def lens(model):
    with torch.no_grad():
        return logit_lens(model, model.to_inputs("is it red?", images=[picture(84, 56)]), "question", targets="red")


def same(ours, theirs) -> bool:
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(torch.nan_to_num(ours, 7.0), torch.nan_to_num(theirs, 7.0))
    if isinstance(ours, pd.DataFrame):
        try:
            pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
        except AssertionError:
            return False
        return True
    if isinstance(ours, Image.Image):
        return ours.mode == theirs.mode and ours.size == theirs.size and ours.tobytes() == theirs.tobytes()
    if dataclasses.is_dataclass(ours):
        return all(same(getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours))
    if isinstance(ours, (tuple, list)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    return ours == theirs or (ours != ours and theirs != theirs)


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_every_field_of_every_result_comes_back(kind, tmp_path):
    """At its worst size, with tokens of every kind, tables with gaps, and images."""
    result = RESULTS[kind]()
    file = result.save(tmp_path / "new" / "result.safetensors")
    again = kind.load(file)
    assert same(result, again)
    pd.testing.assert_frame_equal(result.to_dataframe(), again.to_dataframe(), check_exact=True)
    assert [path.name for path in file.parent.iterdir()] == ["result.safetensors"]


def test_what_is_different_is_not_the_same(lens):
    """The comparison above can fail."""
    assert not same(lens, dataclasses.replace(lens, model_name="another"))
    assert not same(lens, dataclasses.replace(lens, top_probs=lens.top_probs + 1e-7))
    assert not same(lens, dataclasses.replace(lens, top_probs=lens.top_probs.double()))
    table = pd.DataFrame({"a": [1, 2], "b": ["x", None]})
    assert same(table, table.copy())
    for other in (table.astype({"a": float}), table.rename(columns={"a": "c"}), table.fillna("y"), table.set_index("a")):
        assert not same(table, other)
    red = Image.new("RGB", (3, 2), "red")
    assert same(red, red.copy()) and not same(red, Image.new("RGB", (3, 2), "blue")) and not same(red, red.convert("RGBA"))


def test_tables_keep_their_types_gaps_and_index(tmp_path):
    table = pd.DataFrame(
        {"text": ["a", None, "中"], "mixed": [True, None, float("nan")], "small": np.array([1, 2, 3], np.int8), 7: [0.1, np.nan, np.inf],
         "yes": [True, False, True], "lists": [[1], [], ["x"]]}, index=pd.Index([5, 3, 3], name="prompt")
    )  # fmt: skip
    again = Chair.load(Chair(table, 3).save(tmp_path / "a")).mentions
    pd.testing.assert_frame_equal(table, again, check_exact=True)
    assert again["mixed"].tolist()[:2] == [True, None] and again["text"].isna().tolist() == [False, True, False]
    for empty in (pd.DataFrame(), pd.DataFrame({"a": pd.Series([], dtype=float), "b": pd.Series([], dtype=object)})):
        pd.testing.assert_frame_equal(Chair.load(Chair(empty, 3).save(tmp_path / "a")).mentions, empty)
    with pytest.raises(ValueError, match="of type datetime64"):
        Chair(pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), 1).save(tmp_path / "a")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P", "CMYK", "LA"])
def test_images_keep_their_pixels(mode, tmp_path):
    given = picture(7, 5).convert(mode)
    result = TopImages(("decoder", 0, 1), (Fired("a", "?", "d", given, torch.zeros(2, 2)),), ())
    again = TopImages.load(result.save(tmp_path / "a")).examples[0].image
    if mode == "P":
        assert again.mode == "RGBA" and again.convert("RGB").tobytes() == given.convert("RGB").tobytes()
    else:
        assert same(given, again)


def test_a_prompt_comes_back_without_what_belongs_to_this_process(model, tmp_path):
    """Its vision prefix is named after the weights in memory; a model computes it anew."""
    inputs = model.encode(model.to_inputs("is it?", images=[picture(84, 56)]))
    pair = Pair(inputs, inputs, Candidate("?", "a.png", Path("b.png"), "a", None), 1, 2, torch.tensor([1]), torch.tensor([2]), 1.0, -1.0)
    again = Pairs.load(Pairs((pair,), (), "m").save(tmp_path / "a")).kept[0]
    assert again.clean.image_embeds is None and again.clean.encoded_by is None and inputs.image_embeds is not None
    with torch.no_grad():
        assert torch.equal(model(again.clean), model(inputs))
    assert (again.source.clean, again.source.corrupted) == ("a.png", Path("b.png"))


def test_other_files_are_refused(lens, tmp_path):
    file = lens.save(tmp_path / "lens.safetensors")
    with pytest.raises(ValueError, match="holds LogitLens, not Knockout"):
        Knockout.load(file)
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("text.safetensors", "nowhere.safetensors"):
        with pytest.raises(ValueError, match="cannot be read"):
            LogitLens.load(tmp_path / name)
    with pytest.raises(ValueError, match="not set"):
        dataclasses.replace(lens, model_name={"a"}).save(tmp_path / "lens.safetensors")
    assert same(LogitLens.load(file), lens)  # what was there is still there
