"""Edges and paths, against TransformerLens where it has them and against the definition where it has not."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import picture
from tiny import tiny_hf
from transformer_lens import patching
from transformer_lens.tools import analysis

from analyses.direct_path import direct_path_patch
from analyses.edge_attribution import _edges, _reader_names, _writer_names, edge_attribution
from hooked_qwen2vl import HookedQwen2VL


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "full"])
def model(request, processor):
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2, n_key_value_heads=request.param).double(), processor)


@pytest.fixture()
def pair(model):
    return tuple(model.to_inputs("red?", images=[picture(56, 56, seed)]) for seed in (1, 2))


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 7]


def test_edges_equal_those_of_transformer_lens(model, pair):
    if model.cfg.n_key_value_heads != model.cfg.n_heads:
        with pytest.raises(ValueError, match="GQA"):
            analysis.attribution_patch(model, *pair, metric, analysis.EdgeAttributionConfig(granularity="edge"))
        return
    ours = edge_attribution(model, *pair, metric)
    theirs = analysis.attribution_patch(model, *pair, metric, analysis.EdgeAttributionConfig(granularity="edge"))
    totals: dict[tuple[str, str], float] = {}
    for (writer, reader), score in theirs.edge_scores.items():
        key = (_name(writer), _name(reader))
        totals[key] = totals.get(key, 0.0) + float(score)
    table = {(row.writer, row.reader): row.score for row in ours.to_dataframe().itertuples()}
    assert table.keys() == totals.keys()
    assert max(abs(table[key] - totals[key]) for key in totals) < 1e-5


def test_deepstack_writes_after_its_block_and_before_the_next():
    cfg = HookedQwen2VL.from_hf(tiny_hf(family="qwen3_vl")).cfg
    n = len(cfg.vision.deepstack_layers)
    writers, readers, edges = _writer_names(cfg), _reader_names(cfg), _edges(cfg)
    block = [cfg.n_layers if name == "logits" else int(re.findall(r"\d+", name)[0]) for name in readers]
    assert n and writers[1 : 1 + n] == [f"DeepStack{k}" for k in range(n)]
    for k in range(n):
        assert edges[1 + k].tolist() == [at > k for at in block], writers[1 + k]
    assert edges[0].all()


def _name(node) -> str:
    if node.kind == "attn_head_out":
        return f"L{node.layer}H{node.head}"
    if node.kind in ("mlp_out", "mlp_in"):
        return f"MLP{node.layer}"
    if node.kind in ("q_input", "k_input", "v_input"):
        return f"L{node.layer}H{node.head}.{node.kind[0]}"
    return node.kind


def test_an_edge_is_the_slope_of_its_own_path(model, pair):
    """Finite differences: a little of a head's delta put into one reader's input alone."""
    clean, corrupted = pair
    result = edge_attribution(model, clean, corrupted, metric)
    with torch.no_grad():
        caches = [model.run_with_cache(x, names_filter="blocks.0.attn.hook_result")[1] for x in pair]
    delta = (caches[0]["result", 0] - caches[1]["result", 0])[:, :, 3]
    step = 1e-5
    for part, head in (("q", 2), ("k", 1), ("v", 0)):

        def nudge(stream, hook, size):
            stream[:, :, head] += size * delta
            return stream

        name = f"blocks.1.attn.hook_{part}_input"
        with torch.no_grad():
            up, down = (
                metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, lambda x, hook, s=s: nudge(x, hook, s))])) for s in (step, -step)
            )
        score = result.scores[result.writers.index("L0H3"), result.readers.index(f"L1H{head}.{part}")]
        assert abs(score - (up - down) / (2 * step)) < 1e-6


def test_integrated_gradients_are_complete(model, pair):
    """The edges out of the embedding sum to the whole difference; plain EAP's need not."""
    with torch.no_grad():
        whole = metric(model(pair[0])) - metric(model(pair[1]))
    errors = [abs(edge_attribution(model, *pair, metric, ig_steps=steps).scores[0].sum() - whole) for steps in (1, 8, 64)]
    assert errors[2] < 2e-3 * max(1.0, abs(whole)) and errors[2] < errors[0]


def test_bad_input(model, pair):
    with pytest.raises(ValueError, match="do not correspond"):
        edge_attribution(model, pair[0], model.to_inputs("blue and red?"), metric)
    with pytest.raises(ValueError, match="scalar"):
        edge_attribution(model, *pair, lambda logits: logits[0, -1])


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths(model, pair, component):
    clean, corrupted = pair
    with torch.no_grad():
        (_, cache), (_, base) = (model.run_with_cache(x) for x in pair)
        ours = direct_path_patch(model, corrupted, cache, base, metric, (0, 1), component)
        assert ours[0].isnan().all()
        own = metric(model(corrupted))
        if component == "q" or model.cfg.n_heads == model.cfg.n_key_value_heads:
            theirs = patching.get_act_patch_direct_path(model, corrupted, cache, base, metric, 0, 1, component)
            assert torch.allclose(ours[1], theirs[1].to(ours), atol=1e-6)
        assert ours.shape[1] == (4 if component == "q" else model.cfg.n_key_value_heads)
        assert (ours[1] - own).abs().max() > 1e-7


@pytest.mark.parametrize("source", [(-1, 0), (2, 0), (3, 0), (0, -1), (0, 4), (5, 9)])
def test_a_head_that_is_not_there_writes_no_path(model, pair, source):
    clean, corrupted = pair
    _, cache = model.run_with_cache(clean)
    with pytest.raises(ValueError, match="there is no head"):
        direct_path_patch(model, corrupted, cache, cache, metric, source)


def test_the_first_head_writes_paths_and_the_last_layers_do_not(model, pair):
    clean, corrupted = pair
    (_, cache), (_, base) = (model.run_with_cache(x) for x in pair)
    with torch.no_grad():
        assert direct_path_patch(model, corrupted, cache, base, metric, (0, 0))[1].isfinite().all()
        assert direct_path_patch(model, corrupted, cache, base, metric, (model.cfg.n_layers - 1, 3)).isnan().all()


def test_the_table_is_numbered_and_the_title_names_integration(model, pair, tmp_path):
    straight, integrated = (edge_attribution(model, *pair, metric, ig_steps=n, progress=False) for n in (1, 2))
    assert straight.to_dataframe().index.tolist() == list(range(int(straight.edges.sum())))
    titles = [found.plot(tmp_path / "edges.png").get_suptitle() for found in (straight, integrated)]
    assert ["integrated" in title for title in titles] == [False, True]


def test_the_picture(model, pair, tmp_path):
    figure = edge_attribution(model, *pair, metric).plot(tmp_path / "edges.png")
    assert (tmp_path / "edges.png").stat().st_size > 0 and figure.get_suptitle().startswith("Edge attribution")
