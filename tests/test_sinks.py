"""Sinks: planted ones are found, shares by hand, and what is left out of maps."""

from __future__ import annotations

import pytest
import torch
from conftest import picture

from analyses.interventions import Interventions, redirect_attention
from analyses.saliency import saliency
from analyses.sinks import Sinks, find_sinks


@pytest.fixture(scope="module")
def prompt(model):
    return model.encode(model.to_inputs("is it red?", images=[picture(112, 84, 1)]))


def test_attention_received_by_hand(model, prompt):
    _, cache = model.run_with_cache(prompt)
    result = find_sinks(model, prompt)
    n = prompt.shape[1]
    for layer in (0, 2):
        pattern = cache["pattern", layer][0].mean(0)
        for key in (0, 5, n - 2):
            even = sum(1 / (query + 1) for query in range(key + 1, n))
            assert abs(float(result.received[layer, key]) - float(pattern[key + 1 :, key].sum()) / even) < 1e-4
    assert bool(result.received[:, -1].isnan().all())
    assert torch.allclose(result.norms[1], cache["resid_pre", 1][0].norm(dim=-1))


@pytest.mark.parametrize("from_layer", [0, 1, 2])
def test_the_table_by_hand(model, prompt, from_layer):
    """Means over the blocks that count; a threshold half-way between two positions' shares."""
    assert (find_sinks(model, prompt).threshold, find_sinks(model, prompt).from_layer) == (5.0, 1)
    shares = find_sinks(model, prompt).received[from_layer:].mean(0)[:-1].sort(descending=True).values
    result = find_sinks(model, prompt, received=float(shares[1] + shares[2]) / 2, ratio=3.0, from_layer=from_layer)
    assert int(result.is_sink.sum()) == 2 == len(result.to_dataframe())
    table = result.to_dataframe(only_sinks=False)
    assert len(table) == prompt.shape[1] and "index" not in table and table.index.tolist() == list(range(len(table)))
    rows = table.set_index("position")
    _, cache = model.run_with_cache(prompt)
    streams = [cache["resid_pre", layer][0] for layer in range(model.cfg.n_layers)]
    for position in (0, 3, prompt.shape[1] - 2):
        norms = [float(stream[position].norm()) for stream in streams[from_layer:]]
        beside = [norm / float(stream.norm(dim=-1).median()) for norm, stream in zip(norms, streams[from_layer:])]
        assert rows.loc[position, "norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert rows.loc[position, "norm_over_median"] == pytest.approx(sum(beside) / len(beside), rel=1e-5)
        assert rows.loc[position, "received"] == pytest.approx(float(result.received[from_layer:, position].mean()), rel=1e-5)
    found = {(l, p, d) for l, s in enumerate(streams) for p, d in (s.abs() >= 3.0 * s.abs().median()).nonzero().tolist()}
    assert found and found == set(map(tuple, result.massive[["layer", "position", "dimension"]].to_numpy().tolist()))
    with pytest.raises(ValueError, match="image tokens"):
        result.exclude(torch.ones(len(result.image) + 3))


def test_planted_sinks_are_found(model, prompt, tmp_path):
    """All heads are made to look at one image token, and one of its numbers is made massive."""
    place = int(prompt.positions("image")[4])
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]

    def massive(stream, hook):
        stream[:, place, 7] = 1e4
        return stream

    hooks = redirect_attention(prompt, heads, [place], 0.9) + Interventions([("blocks.1.hook_resid_pre", massive)])
    with hooks.on(model):
        result = find_sinks(model, prompt, received=6.0)
    table = result.to_dataframe()
    assert table["position"].tolist()[0] == place and (table.loc[0, "row"], table.loc[0, "col"]) == divmod(4, prompt.grid()[1])
    assert result.image_sinks.nonzero().flatten().tolist() == [4]
    assert {(1, place, 7), (2, place, 7)} <= set(map(tuple, result.massive[["layer", "position", "dimension"]].to_numpy().tolist()))
    assert not find_sinks(model, prompt, received=6.0).image_sinks[4] and not len(find_sinks(model, prompt).massive)
    maps = saliency(model, prompt, target=7, progress=False)
    without = result.exclude(maps)
    assert bool(without.values[:, 4].isnan().all()) and without.values.isnan().sum() == 1 and "without sinks" in without.method
    with pytest.raises(ValueError, match="image tokens"):
        result.exclude(torch.ones(3))
    for images in ((), [picture(112, 84, 1)]):
        result.plot(tmp_path / "sinks.png", images)
    without.plot(tmp_path / "maps.png", [picture(112, 84, 1)])
    result.save(tmp_path / "r.safetensors")
    assert Sinks.load(tmp_path / "r.safetensors").to_dataframe().equals(table)


def test_text_alone_and_what_is_refused(model, prompt):
    assert find_sinks(model, "red or blue").image == ()
    for wrong in ({"received": 0}, {"ratio": -1}, {"from_layer": 99}):
        with pytest.raises(ValueError, match="expected positive thresholds"):
            find_sinks(model, prompt, **wrong)
    with pytest.raises(ValueError, match="expected 1 images"):
        find_sinks(model, prompt).plot(images=[picture(9, 9), picture(9, 9)])
