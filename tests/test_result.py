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
from safetensors import safe_open
from safetensors.torch import save_file

from analyses.common.result import Result
from analyses.counterfactuals import Candidate, Pair, Pairs
from analyses.data.benchmarks import Chair, Mention
from analyses.domain_neurons import DomainNeurons
from analyses.experiments.max_activating import Fired, TopImages
from analyses.flip_patching import FlipAttribution
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
    for name in ("objects", None):
        named = table.rename_axis(columns=name)
        assert same(named, Chair.load(Chair(named, 3).save(tmp_path / "a")).mentions)
    levels = pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["x", None])
    for odd in (
        pd.DataFrame([[1.5, 2], [np.inf, -0.0]], columns=levels, index=levels), pd.DataFrame({"u": np.arange(3, dtype=np.uint16)}),
        pd.DataFrame({"f": np.array([0.1, np.nan], np.float32), "s": ["\x00", ""]}, index=["b", "a"]), pd.DataFrame(np.eye(3)),
        pd.DataFrame({"o": pd.Series([(1, 2), {"a": [None]}, "x", 3, float("nan"), None], dtype=object)}).iloc[::2],
    ):  # fmt: skip
        assert same(odd, Chair.load(Chair(odd, 3).save(tmp_path / "a")).mentions)
    for empty in (
        pd.DataFrame(columns=["a"]),
        pd.DataFrame(index=[3, 4]),
        pd.DataFrame(),
        pd.DataFrame({"a": pd.Series([], dtype=float), "b": pd.Series([], dtype=object)}),
    ):
        pd.testing.assert_frame_equal(Chair.load(Chair(empty, 3).save(tmp_path / "a")).mentions, empty)
    with pytest.raises(ValueError, match="of type datetime64"):
        Chair(pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), 1).save(tmp_path / "a")


def kept(image: Image.Image, file: Path) -> Image.Image:
    result = TopImages(("decoder", 0, 1), (Fired("a", "?", "d", image, torch.zeros(2, 2)),), ())
    return TopImages.load(result.save(file)).examples[0].image


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P", "LA", "CMYK", "YCbCr", "HSV", "LAB", "F", "I", "I;16", "RGBX", "La"])
def test_images_keep_their_pixels(mode, tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    if mode in ("F", "I", "I;16", "LAB", "RGBX", "La"):  # numbers that no eight bits hold, modes that nothing is converted to
        numbers = noise if mode == "I;16" else noise.astype(np.int32) * 977 if mode == "I" else noise.astype(np.float32) / 7
        size = {"LAB": 3, "RGBX": 4, "La": 2, "I;16": 2}.get(mode, 4)
        given = Image.frombytes(mode, (7, 5), (numbers.tobytes() * 2)[: 35 * size])
    else:
        given = Image.fromarray((noise >> 8).astype(np.uint8)).convert(mode)
    again = kept(given, tmp_path / "a")
    assert same(given, again) and type(again) is Image.Image
    assert given.getpalette() == again.getpalette() and given.info.get("transparency") == again.info.get("transparency")


def test_palettes_and_transparency_come_back_or_are_refused(tmp_path):
    few = Image.new("P", (2, 3), 1)
    few.putpalette([1, 2, 3, 250, 0, 9])
    half = Image.new("L", (2, 2), 7)
    half.info["transparency"] = 7
    for given in (few, half, picture(7, 5).quantize(9)):
        again = kept(given, tmp_path / "a")
        assert same(given, again) and same(given.convert("RGBA"), again.convert("RGBA"))
    with pytest.raises(ValueError, match="mode PA .* convert it first"):
        kept(Image.new("PA", (2, 2)), tmp_path / "b")
    assert not list(tmp_path.glob("b*")) and not list(tmp_path.glob(".*"))


def test_a_prompt_comes_back_without_what_belongs_to_this_process(model, tmp_path):
    """Its vision prefix is named after the weights in memory; a model computes it anew."""
    inputs = model.encode(model.to_inputs("is it?", images=[picture(84, 56)]))
    pair = Pair(inputs, inputs, Candidate("?", "a.png", Path("b.png"), "a", None), 1, 2, torch.tensor([1]), torch.tensor([2]), 1.0, -1.0)
    again = Pairs.load(Pairs((pair,), (), "m").save(tmp_path / "a")).kept[0]
    assert again.clean.image_embeds is None and again.clean.encoded_by is None and inputs.image_embeds is not None
    with torch.no_grad():
        assert torch.equal(model(again.clean), model(inputs))
    assert (again.source.clean, again.source.corrupted) == ("a.png", Path("b.png"))


def test_a_class_of_the_same_name_changes_nothing(tmp_path):
    """Classes are found by module and name: a user's own `Selection` once broke `DomainNeurons.load`."""

    @dataclasses.dataclass(frozen=True)
    class Selection(Result):
        mine: int

    neurons = RESULTS[DomainNeurons]()
    assert same(neurons, DomainNeurons.load(neurons.save(tmp_path / "a")))
    own = Selection.load(Selection(3).save(tmp_path / "b"))
    assert own == Selection(3) and type(own) is Selection
    theirs = next(iter(neurons.modules.values()))
    with pytest.raises(ValueError, match=r"holds .*<locals>.Selection, not Selection"):
        type(theirs).load(tmp_path / "b")


def test_a_class_whose_module_moved_is_found(tmp_path, monkeypatch):
    """As a file of before the move has it, inside and outside."""
    nowhere = {kind: kind.__module__ for kind in (TopImages, Fired)}
    for kind in nowhere:
        monkeypatch.setattr(kind, "__module__", "analyses.neuron_pictures")
    given = TopImages(("decoder", 0, 1), (Fired("a", "?", "d", picture(7, 5), torch.zeros(2, 2)),), ("x",))
    given.save(tmp_path / "a")
    for kind, module in nowhere.items():
        monkeypatch.setattr(kind, "__module__", module)
    assert same(given, TopImages.load(tmp_path / "a"))


def test_a_field_that_had_another_name_is_read(tmp_path):
    flip = RESULTS[FlipAttribution]()
    with safe_open(flip.save(tmp_path / "now"), framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert '"flip_layer"' in header["value"]
    save_file(tensors, tmp_path / "before", header | {"value": header["value"].replace('"flip_layer"', '"entry"')})
    assert same(FlipAttribution.load(tmp_path / "before"), flip)


def test_named_tuples_stay_named(tmp_path):
    box = Mention("dog", "dog", 1, 4)
    candidate = Candidate("?", "a.png", "b.png", "a", None, (box, (1.0, 2.0, 3.0, 4.0)))
    again = Candidate.load(candidate.save(tmp_path / "a"))
    assert same(candidate, again) and type(again.boxes[0]) is Mention and type(again.boxes[1]) is tuple


def test_a_file_of_the_format_before_says_who_wrote_it(lens, tmp_path):
    """The file was written by hooked_qwen2vl 0.1."""
    with pytest.raises(
        ValueError, match=r"written by hooked_qwen2vl 0\.1 \(hooked_qwen2vl result 1\).* Compute it again .* or read it with"
    ):
        FlipAttribution.load(Path(__file__).parent / "data" / "result_format_1.safetensors")
    for change, message in (
        ({"format": "hooked_qwen2vl result 3", "version": "9.1"}, r"written by hooked_qwen2vl 9\.1 .* Read it with that version"),
        ({"format": "something"}, "holds no result"),
        (
            {"value": '{"class": "analyses.knockout:Knockout", "fields": {"effects": 1, "gone": 2}}'},
            "had the fields effects, gone, and has ",
        ),
        ({"value": '{"class": "somewhere.else:Thing", "fields": {}}'}, "no class somewhere.else:Thing; import the module"),
    ):
        with safe_open(lens.save(tmp_path / "a"), framework="pt") as file:
            header = file.metadata()
        save_file({}, tmp_path / "a", header | change)
        with pytest.raises(ValueError, match=message):
            LogitLens.load(tmp_path / "a")


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
