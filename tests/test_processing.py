"""Processed weights: the same log-probabilities, TransformerLens's own numbers, and nobody else's weights changed."""

from __future__ import annotations

import itertools
from copy import copy

import pytest
import torch
from conftest import picture, prompts
from tiny import real_rows, reference_logits, tiny_hf
from transformer_lens.weight_processing import ProcessWeights

from hooked_qwen2vl import HookedQwen2VL

LOG_PROBS = 3e-5  # float32; measured 6e-6


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("steps", list(itertools.product([False, True], repeat=3)))
def test_the_log_probabilities_stay(steps, tie, processor):
    hf = tiny_hf(tie=tie)
    before = {name: weight.clone() for name, weight in hf.named_parameters()}
    model = HookedQwen2VL.from_hf(hf, processor)
    model.process_weights(*steps)
    for kind, inputs in prompts(model).items():
        with torch.no_grad():
            ours, theirs = (x.log_softmax(-1) for x in (model(inputs), reference_logits(hf, inputs)))
        assert real_rows(ours - theirs, inputs).abs().max() < LOG_PROBS, kind
    assert all(torch.equal(weight, before[name]) for name, weight in hf.named_parameters())


def tl_format(model) -> dict[str, torch.Tensor]:
    """The names ProcessWeights knows; grouped heads are spelt with an underscore, or are silently not folded."""
    weights = {"embed.W_E": model.W_E, "unembed.W_U": model.W_U, "ln_final.w": model.ln_final.w}
    for layer, block in enumerate(model.blocks):
        here = {"ln1.w": block.ln1.w, "ln2.w": block.ln2.w}
        here |= {f"attn.{name}": getattr(block.attn, name) for name in ("W_Q", "W_O", "b_Q", "b_O")}
        here |= {f"attn._{name}": getattr(block.attn, name) for name in ("W_K", "W_V", "b_K", "b_V")}
        here |= {f"mlp.{name}": getattr(block.mlp, name) for name in ("W_in", "W_gate", "W_out")}
        weights |= {f"blocks.{layer}.{name}": weight for name, weight in here.items()}
    return {name: weight.detach().clone() for name, weight in weights.items()}


def test_the_weights_are_those_of_transformer_lens(processor):
    model = HookedQwen2VL.from_hf(tiny_hf(tie=True), processor)
    raw = tl_format(model)
    cfg = copy(model.cfg)
    theirs = ProcessWeights.process_weights(
        raw, cfg, fold_ln=True, center_writing_weights=False, center_unembed=True, fold_value_biases=True
    )
    model.process_weights()
    ours = tl_format(model)
    compared = 0
    for name, weight in theirs.items():
        if name in ours and not name.endswith(("ln1.w", "ln2.w", "ln_final.w")):
            assert torch.allclose(ours[name], weight, atol=1e-6), name
            compared += 1
    assert compared > 30


def test_a_tied_embedding_survives(processor):
    model = HookedQwen2VL.from_hf(tiny_hf(tie=True), processor)
    embedding = model.W_E.clone()
    model.process_weights()
    assert torch.equal(model.W_E, embedding)
    assert not torch.allclose(model.W_U, embedding.T)
    assert torch.equal(model.ln_final.w, torch.ones_like(model.ln_final.w))


def test_listening_changes_nothing_on_processed_weights(processor):
    """The folded bias is on every path: per-head results, explicit attention, split inputs."""
    model = HookedQwen2VL.from_hf(tiny_hf(), processor)
    model.process_weights()
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        plain = model(inputs)
        looked, _ = model.run_with_cache(inputs, names_filter=lambda name: True)
    assert model.b_O.abs().max() > 0.01
    assert (looked - plain).abs().max() < 1e-5
