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


def test_the_weights_are_those_of_transformer_lens(processor):
    model = HookedQwen2VL.from_hf(tiny_hf(tie=True), processor)
    raw = {}
    for name, weight in model.tl_named_parameters():
        for part in ("W_K", "W_V", "b_K", "b_V"):  # grouped heads are spelt so, or are silently not folded
            name = name.replace(f"attn.{part}", f"attn._{part}")
        if not name.endswith(("b_U", "b_in", "b_out")):
            raw[name] = weight.detach().clone()
    cfg = copy(model.cfg)
    theirs = ProcessWeights.process_weights(
        raw, cfg, fold_ln=True, center_writing_weights=False, center_unembed=True, fold_value_biases=True
    )
    model.process_weights()
    ours = model.tl_parameters()
    compared = 0
    for name, weight in theirs.items():
        name = name.replace("attn._", "attn.")
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
