"""The rest of TransformerLens's tools that take a model, called natively with images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import picture
from tiny import tiny_hf
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.SVDInterpreter import SVDInterpreter
from transformer_lens.tools import analysis

from hooked_qwen2vl import HookedQwen2VL


@pytest.fixture(scope="module")
def grouped(processor):
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)


@pytest.fixture(scope="module")
def full(processor):
    """As many key-value heads as heads: what TransformerLens's edge tools ask for."""
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2, n_key_value_heads=4), processor)


@pytest.fixture()
def bridge_of(tmp_path):
    """A model's text weights as a TransformerLens bridge."""
    from transformer_lens.model_bridge import TransformerBridge

    def boot(model):
        folder = model.export_text_model(tmp_path / "text")
        return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)

    return boot


def pair(model):
    return tuple(model.to_inputs("is it red?", images=[picture(84, 56, seed)]) for seed in (1, 2))


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 7]


@pytest.mark.parametrize("processed", [False, True])
def test_direct_logit_attribution(processor, processed):
    """Over components and over heads the attributions sum to the model's own logit difference."""
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)
    if processed:
        model.process_weights()
    inputs, _ = pair(model)
    with torch.no_grad():
        difference = metric(model(inputs))
        result = analysis.direct_logit_attribution(model, inputs, 5, 7)
    assert abs(float(result.attribution.sum()) - float(difference)) < 1e-4


def test_attribution_patching_over_nodes(grouped):
    """To first order: the whole embedding's attribution is the slope along the difference of the embeddings."""
    clean, corrupted = pair(grouped)
    result = analysis.attribution_patch(grouped, clean, corrupted, metric)
    assert len(result.node_scores) > 0
    with torch.no_grad():
        _, a = grouped.run_with_cache(clean, names_filter="hook_embed")
        _, b = grouped.run_with_cache(corrupted, names_filter="hook_embed")
        direction = a["hook_embed"] - b["hook_embed"]
        step = 1e-3
        up, down = (
            metric(grouped.run_with_hooks(corrupted, fwd_hooks=[("hook_embed", lambda x, hook, s=s: x + s * direction)]))
            for s in (step, -step)
        )
    slope = float((up - down) / (2 * step))
    embed = sum(float(score) for node, score in result.node_scores.items() if node.kind == "embed")
    assert abs(embed - slope) < 2e-2 * max(1.0, abs(slope))


def test_edges_on_full_heads_and_their_refusal_on_grouped(full, grouped):
    config = analysis.EdgeAttributionConfig(granularity="edge")
    clean, corrupted = pair(full)
    result = analysis.attribution_patch(full, clean, corrupted, metric, config)
    assert len(result.edge_scores) > 0
    clean, corrupted = pair(grouped)
    with pytest.raises(ValueError, match="GQA"):
        analysis.attribution_patch(grouped, clean, corrupted, metric, config)


def test_direct_paths(full, grouped):
    """Into queries on any model, into keys and values on full heads."""
    for model, components in ((full, ("q", "k", "v")), (grouped, ("q",))):
        clean, corrupted = pair(model)
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            _, base = model.run_with_cache(corrupted)
            own = metric(model(corrupted))
            for component in components:
                cells = patching.get_act_patch_direct_path(
                    model, corrupted, cache, base, metric, src_layer=0, src_head=1, component=component
                )
                assert (cells - own).abs().max() > 1e-6
    with pytest.raises(ValueError, match="GQA"):
        patching.get_act_patch_direct_path(grouped, corrupted, cache, base, metric, src_layer=0, src_head=1, component="k")


def test_interchange(grouped):
    """Swapping the whole space of one position is activation patching."""
    clean, corrupted = pair(grouped)
    name, last = "blocks.1.hook_resid_pre", torch.tensor([clean.shape[1] - 1])

    def task(inputs):
        return grouped(inputs)[:, -1, [5, 7]]

    with torch.no_grad():
        source = analysis.collect_activations(grouped, name, clean, task, positions=last)
        whole = analysis.SubspaceInterchange(torch.eye(grouped.cfg.d_model))
        ours = analysis.run_with_intervention(grouped, name, whole, corrupted, source, task, positions=last)
        _, cache = grouped.run_with_cache(clean)

        def put(residual, hook):
            residual[:, last] = cache[name][:, last]

        theirs = grouped.run_with_hooks(corrupted, fwd_hooks=[(name, put)])[:, -1, [5, 7]]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_sparse_probing(grouped):
    """On cached activations of prompts with images of two kinds: dark and bright."""
    images, labels = [], []
    for seed in range(24):
        dark = seed % 2
        pixels = np.asarray(picture(56, 56, seed)) // (8 if dark else 1)
        images.append(pixels.astype(np.uint8)), labels.append(dark)
    inputs = grouped.to_inputs(["dark?"] * 24, images=[[image] for image in images])
    with torch.no_grad():
        _, cache = grouped.run_with_cache(inputs, names_filter="hook_embed")
    features = cache["hook_embed"][:, inputs.span("image")].mean(1)
    result = analysis.fit_sparse_probe(features, torch.tensor(labels), k=4, seed=0)
    assert result.metrics.roc_auc > 0.9


@pytest.mark.parametrize("role", ["Q", "K", "V"])
def test_projection_kernel(grouped, bridge_of, role):
    """Equal to the same tool on a TransformerLens bridge with the same text weights."""
    ours, theirs = (analysis.attention_head_subspace_affinity(model, target_role=role) for model in (grouped, bridge_of(grouped)))
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5, equal_nan=True), field.name


def test_head_detector(grouped):
    inputs, _ = pair(grouped)
    with torch.no_grad():
        for pattern in ("previous_token_head", "duplicate_token_head", "induction_head"):
            scores = detect_head(grouped, inputs, pattern)
            assert scores.shape == (2, 4) and scores.isfinite().all()
        _, cache = grouped.run_with_cache(inputs, remove_batch_dim=True)
        previous = detect_head(grouped, inputs, "previous_token_head", error_measure="mul")
    pattern = cache["pattern", 1][2]
    expected = pattern.diagonal(-1).sum() / pattern.tril().sum()
    assert abs(previous[1, 2] - expected) < 1e-5


def test_svd_interpreter(grouped):
    """Head by head, grouped heads included: singular vectors of that head's own OV circuit, read through W_U."""
    interpreter = SVDInterpreter(grouped)
    for head in range(4):
        ours = interpreter.get_singular_vectors("OV", layer_index=1, head_index=head, num_vectors=2)
        W_V, W_O = grouped.blocks[1].attn.W_V[head // 2], grouped.blocks[1].attn.W_O[head]
        vectors = torch.linalg.svd(W_V @ W_O).Vh[:2]
        expected = (vectors @ grouped.W_U).T.detach()
        assert torch.allclose(ours.squeeze(1).abs(), expected.abs(), atol=1e-3)
    assert interpreter.get_singular_vectors("w_in", layer_index=0, num_vectors=2).shape[0] == grouped.cfg.d_vocab
    assert interpreter.get_singular_vectors("w_out", layer_index=0, num_vectors=2).shape[0] == grouped.cfg.d_vocab


def test_patching_results_with_intervals(grouped):
    """Per-example values and their mean, over a batch of pairs."""
    clean = grouped.to_inputs(["is it?", "is it?"], images=[[picture(84, 56, 1)], [picture(84, 56, 2)]])
    corrupted = grouped.to_inputs(["is it?", "is it?"], images=[[picture(84, 56, 3)], [picture(84, 56, 4)]])
    with torch.no_grad():
        _, cache = grouped.run_with_cache(clean)
        result = patching.get_act_patch_resid_pre(
            grouped, corrupted, cache, lambda logits: logits[:, -1, 5] - logits[:, -1, 7], reduce="none"
        )
        for row in range(2):
            alone = patching.get_act_patch_resid_pre(grouped, corrupted[row], cache.apply_slice_to_batch_dim(slice(row, row + 1)), metric)
            assert torch.allclose(result.values[..., row], alone, atol=1e-4)


def test_faithfulness(full, grouped):
    """Every edge kept recovers all, none recovers nothing; grouped heads are refused by TransformerLens."""
    clean, corrupted = (full.to_inputs("red?", images=[picture(28, 28, seed)], template=False) for seed in (1, 2))
    edges = analysis.attribution_patch(full, clean, corrupted, metric, analysis.EdgeAttributionConfig(granularity="edge")).edge_scores
    everything = analysis.faithfulness(full, clean, corrupted, metric, list(edges))
    assert abs(everything.recovered - 1.0) < 1e-3 and everything.circuit_size == everything.total_edges
    with torch.no_grad():
        assert abs(everything.full_metric - float(metric(full(clean)))) < 1e-5
    nothing = analysis.faithfulness(full, clean, corrupted, metric, [])
    assert abs(nothing.recovered) < 1e-3
    with pytest.raises(ValueError, match="GQA"):
        analysis.faithfulness(grouped, *pair(grouped), metric, [])


def test_the_jacobian_lens_is_refused(grouped):
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    with pytest.raises(TypeError, match="TransformerBridge"):
        JacobianLens.fit(grouped, ["the red thing"], corpus="made here")
