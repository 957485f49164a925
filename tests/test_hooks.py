"""Every hook is live, and nothing a hook does outlives its run."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from tiny import tiny_hf

from hooked_qwen2vl import HookedQwen2VL

# A hook point without effect, and why: none.
WITHOUT_EFFECT: dict[str, str] = {}


@pytest.fixture(scope="module")
def small(processor):
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2, vision_layers=2), processor)


@pytest.fixture(scope="module")
def inputs(small):
    return small.to_inputs("what is this?", images=[picture(84, 56)])


def test_every_hook_is_live(small, inputs):
    """Seeded noise on what a hook carries changes the logits: text side, projector and tower."""
    with torch.no_grad():
        plain = small(inputs)
    dead = []
    for name in small.hook_dict:

        def noise(activation, hook):
            generator = torch.Generator().manual_seed(1)
            return activation + 0.3 * torch.randn(activation.shape, generator=generator)

        with torch.no_grad():
            noisy = small.run_with_hooks(inputs, fwd_hooks=[(name, noise)])
        if not (noisy - plain).abs().max() > 1e-4:
            dead.append(name)
    assert dead == sorted(WITHOUT_EFFECT)


def test_listening_changes_nothing(small, inputs):
    """Looking at any one activation leaves the logits as they were, to rounding."""
    with torch.no_grad():
        plain = small(inputs)
        for name in small.hook_dict:
            looked, _ = small.run_with_cache(inputs, names_filter=name)
            assert (looked - plain).abs().max() < 1e-5, name


@pytest.mark.parametrize("encoded", [False, True])
def test_edits_in_place_do_not_leak(small, inputs, encoded):
    """A hook that overwrites what it is handed harms neither weights, inputs, prefix nor the next run."""
    given = small.encode(inputs) if encoded else inputs
    with torch.no_grad():
        plain = small(given)
        weights = {name: weight.clone() for name, weight in small.named_parameters()}
        pixels = given.pixels.clone()
        prefix = None if given.image_embeds is None else given.image_embeds.clone()
        for name in small.hook_dict:
            small.run_with_hooks(given, fwd_hooks=[(name, lambda activation, hook: activation.fill_(0.5))])
            assert torch.equal(small(given), plain), name
        assert all(torch.equal(weight, weights[name]) for name, weight in small.named_parameters())
        assert torch.equal(given.pixels, pixels)
        assert prefix is None or torch.equal(given.image_embeds, prefix)


@pytest.mark.parametrize("branch", ["hook_mlp_in", "hook_attn_in", "attn.hook_q_input"])
def test_the_other_branch_of_a_fork_does_not_see_an_edit(small, inputs, branch):
    """Overwriting the entry of one branch in place leaves the residual stream it forked from alone."""
    stream = "hook_resid_mid" if branch == "hook_mlp_in" else "hook_resid_pre"
    name = f"blocks.1.{stream}"
    with torch.no_grad():
        _, clean = small.run_with_cache(inputs, names_filter=name)
        with small.hooks(fwd_hooks=[(f"blocks.1.{branch}", lambda activation, hook: activation.zero_())]):
            _, edited = small.run_with_cache(inputs, names_filter=name)
    assert torch.equal(clean[name], edited[name])


def test_a_zeroed_pattern_silences_attention(small, inputs):
    """The pattern that a hook returns is the one that runs, in both halves."""
    for half in ("", "vision_encoder."):
        prefix = f"{half}blocks.0"
        with torch.no_grad(), small.hooks(fwd_hooks=[(f"{prefix}.attn.hook_pattern", lambda p, hook: p * 0)]):
            _, cache = small.run_with_cache(inputs, names_filter=f"{prefix}.hook_attn_out")
        bias = small.get_submodule(f"{prefix}.attn").b_O
        assert torch.allclose(cache[f"{prefix}.hook_attn_out"], bias.expand_as(cache[f"{prefix}.hook_attn_out"]))


def test_overwriting_one_split_input_leaves_the_others(small, inputs):
    """Queries, keys and values are made from copies of their own."""
    names = [f"blocks.1.attn.hook_{part}" for part in "qkv"]
    split = "blocks.1.attn.hook_q_input"
    with torch.no_grad():
        _, clean = small.run_with_cache(inputs, names_filter=names)
        with small.hooks(fwd_hooks=[(split, lambda activation, hook: activation.zero_())]):
            _, edited = small.run_with_cache(inputs, names_filter=names)
    assert not torch.allclose(clean[names[0]], edited[names[0]], atol=1e-2)
    for name in names[1:]:
        assert torch.allclose(clean[name], edited[name], atol=1e-6), name


@pytest.mark.parametrize("half", ["", "vision_encoder."])
def test_an_edited_norm_is_live_also_where_the_inputs_are_split(small, inputs, half):
    """Editing ln1 gives the same logits whether or not somebody looks at the split inputs."""
    edit = (f"{half}blocks.1.ln1.hook_normalized", lambda activation, hook: activation * 1.3 + 0.1)
    look = (f"{half}blocks.1.attn.hook_k_input", lambda activation, hook: None)
    with torch.no_grad():
        plain = small(inputs)
        edited = small.run_with_hooks(inputs, fwd_hooks=[edit])
        both = small.run_with_hooks(inputs, fwd_hooks=[edit, look])
    assert (edited - plain).abs().max() > 1e-3
    assert (both - edited).abs().max() < 1e-5
