"""Interventions: equal to edits of the weights, to hand-made runs, and the same in every way of running the model."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from conftest import picture
from tiny import tiny_hf, tiny_processor3
from transformer_lens import patching
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from analyses.interventions import (
    Interventions,
    ablate,
    contrast_direction,
    drop_tokens,
    hide,
    hook_names,
    mask_image,
    project_out,
    redirect_attention,
    scale_heads,
    steer,
    token_direction,
)
from analyses.knockout import knockout_hooks
from analyses.patching import patch_sweep
from analyses.project_away import project_away_hooks
from hooked_qwen2vl import HookedQwen2VL

SAME = 1e-5  # float32; measured 3e-6
FAMILIES = ("qwen2_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl")  # all three in the slow half
MODELS: dict[str, HookedQwen2VL] = {}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, processor):
    family = request.param
    if family not in MODELS:
        MODELS[family] = HookedQwen2VL.from_hf(tiny_hf(family=family), tiny_processor3() if family == "qwen3_vl" else processor)
    return MODELS[family]


@pytest.fixture(scope="module")
def prompt(model):
    return model.encode(model.to_inputs("is it red?", images=[picture(96, 128, 1)]))


@pytest.fixture(scope="module")
def batch(model):
    """Rows of other lengths and images, padded."""
    return model.encode(model.to_inputs(["is it?", "what is the thing?"], images=[[picture(96, 64, 1)], [picture(64, 64, 2)]]))


@pytest.fixture(scope="module")
def reference(model):
    inputs = model.to_inputs(["which?", "what of the two?"], images=[[picture(64, 96, 5)], [picture(64, 64, 6)]])
    return model.run_with_cache(inputs)[1]


@torch.no_grad()
def logits(model, inputs, hooks=()):
    return model.run_with_hooks(inputs, fwd_hooks=hooks)


def some(model, inputs, reference) -> dict[str, Interventions]:
    """One of every kind; with a place and without."""
    torch.manual_seed(3)
    d = torch.randn(model.cfg.d_model)
    last = model.cfg.n_layers - 1
    return {
        "zero": ablate(heads=[(0, 1), (1, 0), (1, 3)], neurons=[(last, 5)], mlps=[1]),
        "mean": ablate(heads=[(1, 2)], layers=[0], how="mean", reference=reference),
        "resample": ablate(heads=[(1, 2), (0, 0)], neurons=[(0, 9), (0, 3)], how="resample", reference=reference, seed=4),
        "tokens": ablate(positions="image", inputs=inputs),
        "heads at the question": ablate(heads=[(0, 1), (1, 0)], positions="question", inputs=inputs, generated=True),
        "steer": steer(d, [0, last], "image", 0.5, inputs),
        "steer everywhere": steer(d, [1], scale=0.5),
        "project out": project_out(d, [1, last]),
        "project away": Interventions(project_away_hooks(inputs, d, [1]) + project_away_hooks(inputs, -d, [1])),
        "scale": scale_heads({(0, 0): 2.0, (1, 1): -0.5}),
        "redirect": redirect_attention(inputs, [(0, 0), (1, 2)], "image", 0.7),
        "hide": hide(inputs, "question"),
        "mask": mask_image(inputs, (30.0, 30.0, 64.0, 64.0)),
        "all of them": ablate(heads=[(0, 1)]) + steer(d, [1], "image", 0.5, inputs) + scale_heads({(1, 0): 3.0}) + hide(inputs, "question"),
    }


# ---- identities ---------------------------------------------------------------------------------


def test_zero_ablation_is_an_edit_of_the_weights(model, prompt):
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.blocks[0].attn.W_O[1] = 0
        edited.blocks[1].attn.W_O[[0, 3]] = 0
        edited.blocks[2].mlp.W_out[5] = 0
        edited.blocks[1].mlp.W_out[:] = 0
        edited.blocks[2].attn.W_O[:] = 0
    hooks = ablate(heads=[(0, 1), (1, 0), (1, 3)], neurons=[(2, 5)], mlps=[1], attentions=[2])
    assert torch.allclose(logits(model, prompt, hooks), logits(edited, prompt), atol=SAME)
    for part in (ablate(heads=[(0, 1)]), ablate(neurons=[(2, 5)]), ablate(mlps=[1]), ablate(attentions=[2])):
        assert (logits(model, prompt, part) - logits(model, prompt)).abs().max() > 1e-4


def test_nothing_changes_where_nothing_is_asked(model, prompt):
    d = torch.randn(model.cfg.d_model)
    plain = logits(model, prompt)
    for hooks in (steer(d, [0, 1], scale=0.0), scale_heads({(0, 1): 1.0}), steer(d, [1], "image", 0.0, prompt)):
        assert torch.equal(logits(model, prompt, hooks), plain)
    share = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_pattern")[1]["blocks.1.attn.hook_pattern"][0, 2]
    own = float(share[-1, prompt.positions("image")].sum())
    hooks = redirect_attention(prompt, [(1, 2)], "image", own, "last", generated=False)
    assert torch.allclose(logits(model, prompt, hooks), plain, atol=SAME)
    assert torch.equal(logits(model, prompt, scale_heads({(0, 1): 0.0})), logits(model, prompt, ablate(heads=[(0, 1)])))


def test_mean_and_resample_by_hand(model, prompt, reference):
    real = reference.prompt_shape.attention_mask.bool()
    name = "blocks.1.attn.hook_z"
    tokens = reference[name][real][:, 2]
    seen = {}

    def look(z, hook):
        seen["z"] = z.clone()

    logits(model, prompt, ablate(heads=[(1, 2)], how="mean", reference=reference) + [(name, look)])
    assert torch.allclose(seen["z"][0, :, 2], tokens.mean(0).expand(prompt.shape[1], -1), atol=SAME)
    logits(model, prompt, ablate(heads=[(1, 2), (1, 0)], how="resample", reference=reference, seed=1) + [(name, look)])
    drawn = (seen["z"][0, :, None, 2] == tokens[None]).all(-1)
    assert bool(drawn.any(-1).all()) and len(drawn.float().argmax(-1).unique()) > 5
    both = reference[name][real][:, [2, 0]]
    assert bool((seen["z"][0, :, None, [2, 0]] == both[None]).flatten(2).all(-1).any(-1).all())  # the same token for both heads
    logits(model, prompt, ablate(heads=[(1, 2)], how="resample", reference=reference, seed=2) + [(name, look)])
    assert not torch.equal((seen["z"][0, :, None, 2] == tokens[None]).all(-1), drawn)


def test_tokens_without_their_stream_are_blind_to_the_image(model, prompt):
    """With the image tokens at 0, DeepStack's terms too, another image of the same grid gives the same logits."""
    other = model.to_inputs("is it red?", images=[picture(96, 128, 9)])
    hooks = ablate(positions="image", inputs=prompt)
    assert torch.equal(logits(model, prompt, hooks), logits(model, other, hooks))
    assert (logits(model, prompt) - logits(model, other))[0, -1].abs().max() > 1e-3


def test_steering_by_hand(model, prompt):
    d = torch.randn(model.cfg.d_model)
    with torch.no_grad():
        stream = model(prompt, stop_at_layer=2)
        stream[:, prompt.positions("image")] += 1.5 * d
        expected = model(stream, start_at_layer=2, inputs=prompt)
    assert torch.allclose(logits(model, prompt, steer(d, [2], "image", 1.5, prompt)), expected, atol=SAME)


def test_directions(model, prompt):
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt)
        other = model.to_inputs("is it blue?", images=[picture(96, 128, 2)])
        _, cache2 = model.run_with_cache(other)
    d = contrast_direction(model, prompt, other, 1, "image")
    means = [c["resid_pre", 1][0, prompt.positions("image")].mean(0) for c in (cache, cache2)]
    assert torch.allclose(d, means[0] - means[1], atol=SAME)
    final = cache["resid_post", model.cfg.n_layers - 1][0, -1]
    moved = [model.unembed(model.ln_final((final + step * token_direction(model, 7, 9))[None, None]))[0, 0] for step in (0.0, 1e-1)]
    assert (moved[1][7] - moved[1][9]) > (moved[0][7] - moved[0][9])
    seen = {}
    hooks = project_out(d, [1]) + [("blocks.1.hook_resid_pre", lambda stream, hook: seen.update(stream=stream.clone()))]
    logits(model, prompt, hooks)
    assert (seen["stream"][0] @ d).abs().max() < 1e-4 * d.norm() * seen["stream"][0].norm(dim=-1).max()


def test_redirected_shares(model, prompt):
    _, plain = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_pattern")
    image = prompt.positions("image")
    with redirect_attention(prompt, [(1, 0), (1, 3)], "image", 0.6).on(model):
        _, cache = model.run_with_cache(prompt, names_filter="blocks.1.attn.hook_pattern")
    before, after = plain["blocks.1.attn.hook_pattern"][0], cache["blocks.1.attn.hook_pattern"][0]
    queries = slice(int(image[0]), None)
    assert torch.allclose(after[[0, 3], queries][..., image].sum(-1), torch.tensor(0.6), atol=SAME)
    assert torch.allclose(after.sum(-1), torch.tensor(1.0), atol=SAME) and torch.equal(after[1:3], before[1:3])
    assert torch.equal(after[:, : int(image[0])], before[:, : int(image[0])])
    ratio = after[0, -1, image] / before[0, -1, image]
    assert torch.allclose(ratio, ratio[0], rtol=1e-3)
    assert not torch.triu(after[0], 1).any()


# ---- every way of running -----------------------------------------------------------------------


GREEDY = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False, "output_logits": True}


def test_cached_generation_is_uncached_generation(model, batch, reference):
    plain = logits(model, batch)[:, -1]
    for name, hooks in some(model, batch, reference).items():
        cached, uncached = (model.generate(batch, fwd_hooks=hooks, use_past_kv_cache=cached, **GREEDY) for cached in (True, False))
        assert torch.equal(cached.sequences, uncached.sequences), name
        assert torch.allclose(torch.stack(cached.logits), torch.stack(uncached.logits), atol=SAME), name
        assert (cached.logits[0] - plain).abs().max() > 1e-4, name


def test_a_row_of_a_batch_is_the_row_alone(model, batch, reference):
    together = {name: logits(model, batch, hooks)[:, -1] for name, hooks in some(model, batch, reference).items() if name != "resample"}
    for row in range(2):
        alone = batch[row]
        for name, hooks in some(model, alone, reference).items():
            if name != "resample":  # draws by position, which padding moves
                assert torch.allclose(together[name][row], logits(model, alone, hooks)[0, -1], atol=2 * SAME), name


SETTERS = {"resid_pre": patching.layer_pos_patch_setter, "z": patching.layer_pos_head_vector_patch_setter}


@pytest.mark.parametrize("activation", SETTERS)
def test_sweeps_are_transformer_lens_s_loops(model, prompt, reference, activation):
    clean = model.to_inputs("is it red?", images=[picture(96, 128, 3)])
    places = [int(prompt.positions("image")[1]), prompt.shape[1] - 2]
    axes = {"layer": [0, 1], "pos": places} | ({"head": [1]} if activation == "z" else {})
    table = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)

    def metric(values):
        return values[:, -1, 5] - values[:, -1, 7]

    kinds = some(model, prompt, reference)
    for name in ("zero", "resample", "tokens", "steer", "project away", "redirect", "all of them"):
        with kinds[name].on(model), torch.no_grad():
            _, cache = model.run_with_cache(clean)
            values = patching.generic_activation_patch(
                model, prompt, cache, lambda values: metric(values)[0], SETTERS[activation], activation, index_df=table
            )
            heads = axes.get("head")
            ours = patch_sweep(model, clean, prompt, metric, activation, [0, 1], places, heads, progress=False).values.flatten()
        assert torch.allclose(ours, values, atol=SAME * max(1.0, float(values.abs().max()))), name


def test_knockout_is_hiding(model, prompt):
    after = range(int(prompt.positions("image")[-1]) + 1, prompt.shape[1])
    ours = logits(model, prompt, hide(prompt, "image", [1, 2]))
    assert torch.allclose(ours[:, after], logits(model, prompt, knockout_hooks(prompt, "image", after, [1, 2]))[:, after], atol=SAME)


# ---- tokens that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("from_layer", [1, 2])
def test_dropping_is_hiding(model, prompt, batch, from_layer):
    layers = range(from_layer, model.cfg.n_layers)
    for inputs in (prompt, batch):
        dropped, hidden = drop_tokens(inputs, "image", from_layer), hide(inputs, "image", layers)
        stay = (inputs.token_types == 0) & inputs.attention_mask.bool()
        ours, theirs = logits(model, inputs, dropped), logits(model, inputs, hidden)
        assert torch.allclose(ours[stay], theirs[stay], atol=SAME)
        assert (ours - logits(model, inputs))[stay].abs().max() > 1e-4
        for cached in (True, False):
            ours, theirs = (model.generate(inputs, fwd_hooks=hooks, use_past_kv_cache=cached, **GREEDY) for hooks in (dropped, hidden))
            assert torch.equal(ours.sequences, theirs.sequences)
            assert torch.allclose(torch.stack(ours.logits), torch.stack(theirs.logits), atol=SAME)


def test_dropping_with_other_interventions_and_twice(model, prompt, reference):
    for name, hooks in some(model, prompt, reference).items():
        span = "question" if name == "redirect" else "image"
        dropped, hidden = drop_tokens(prompt, span, 2), hide(prompt, span, range(2, model.cfg.n_layers))
        ours, theirs = (logits(model, prompt, more + hooks) for more in (dropped, hidden))
        assert torch.allclose(ours[0, -1], theirs[0, -1], atol=SAME), name
    first = prompt.positions("image")[:3].tolist()
    twice = drop_tokens(prompt, first, 1) + drop_tokens(prompt, "question", 2)
    hidden = hide(prompt, first) + hide(prompt, "question", range(2, model.cfg.n_layers))
    hidden = hide(prompt, first, range(1, model.cfg.n_layers)) + hidden[1:]
    assert torch.allclose(logits(model, prompt, twice)[0, -1], logits(model, prompt, hidden)[0, -1], atol=SAME)


def test_positions_stay_in_the_cache_of_a_run_with_dropped_tokens(model, prompt):
    image = prompt.positions("image")
    with drop_tokens(prompt, "image", 1).on(model):
        out, cache = model.run_with_cache(prompt)
        _, generated = model.generate(prompt, **GREEDY | {"output_logits": False}, return_cache=True, names_filter=list(cache.keys()))
    with hide(prompt, "image", range(1, model.cfg.n_layers)).on(model):
        _, hidden = model.run_with_cache(prompt)
    for key in ("blocks.2.hook_resid_pre", "blocks.2.attn.hook_z", "blocks.1.attn.hook_pattern"):
        at_image = cache[key][..., image] if key.endswith("pattern") else cache[key][:, image]
        assert bool(at_image.isnan().all())
        there = ~cache[key].isnan()
        assert torch.allclose(cache[key][there], hidden[key][there], atol=SAME) and float(there.float().mean()) > 0.3
        n = prompt.shape[1]
        assert generated[key].shape[-2 if key.endswith("pattern") else 1] == n + GREEDY["max_new_tokens"]
    with torch.no_grad():
        left = model(prompt, stop_at_layer=1)
        assert torch.allclose(out[:, image], model.read_out(left)[:, image], atol=SAME)


def test_a_past_without_the_dropped_tokens_is_not_gone_on_from(model, prompt):
    past = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(prompt))
    with drop_tokens(prompt, "image", 1).on(model):
        _, past = model(prompt, past_kv_cache=past, return_type="logits_and_cache")
        with pytest.raises(ValueError, match="tokens were dropped from its run"):
            model(prompt.tokens[:, -1:], past_kv_cache=past)


def test_dropping_in_a_sweep_is_refused(model, prompt):
    with drop_tokens(prompt, "image", 2).on(model), pytest.raises(ValueError, match="hide the tokens' keys"):
        patch_sweep(model, prompt, prompt, lambda values: values[:, -1, 0], layers=[0], progress=False)


# ---- what is refused ----------------------------------------------------------------------------


@torch.no_grad()
def test_a_reference_of_plain_tensors_counts_every_token(model, prompt):
    values = torch.randn(2, 5, model.cfg.n_heads, model.cfg.d_head, generator=torch.Generator().manual_seed(3))
    seen = {}
    name = "blocks.1.attn.hook_z"
    ours = ablate(heads=[(1, 2)], how="mean", reference={name: values})
    logits(model, prompt, ours + [(name, lambda z, hook: seen.update(z=z.clone()))])
    assert torch.allclose(seen["z"][0, :, 2], values.flatten(0, 1)[:, 2].mean(0).expand(prompt.shape[1], -1), atol=1e-6)


def test_a_direction_against_another_token_is_the_difference(model):
    one, two = (model.ln_final.w * model.W_U[:, token] for token in (7, 9))
    assert torch.equal(token_direction(model, 7), one) and torch.allclose(token_direction(model, 7, 9), one - two)


def test_what_is_refused(model, prompt, batch, reference):
    other = model.to_inputs("is it red?", images=[picture(128, 96, 1)])
    d = torch.ones(model.cfg.d_model)
    with pytest.raises(ValueError, match="nothing to ablate"):
        ablate()
    with pytest.raises(ValueError, match="needs reference="):
        ablate(heads=[(0, 0)], how="mean")
    with pytest.raises(ValueError, match="needs no reference="):
        ablate(heads=[(0, 0)], reference=reference)
    with pytest.raises(ValueError, match="how must be"):
        ablate(heads=[(0, 0)], how="median")
    with pytest.raises(ValueError, match="pass inputs="):
        ablate(heads=[(0, 0)], positions="image")
    with pytest.raises(ValueError, match="inputs= goes with positions="):
        ablate(heads=[(0, 0)], inputs=prompt)
    with pytest.raises(ValueError, match="generated=True goes with"):
        steer(d, [0], generated=True)
    with pytest.raises(ValueError, match="zero vector"):
        project_out(0 * d, [0])
    with pytest.raises(ValueError, match="not finite"):
        steer(d / 0, [0])
    with pytest.raises(ValueError, match="a direction for each of 2"):
        steer(d.expand(3, -1), [0, 1])
    with pytest.raises(ValueError, match="at least one head"):
        redirect_attention(prompt, [(0, 0)], "image", 1.2)
    with pytest.raises(ValueError, match="at least 1"):
        drop_tokens(prompt, "image", 0)
    with pytest.raises(ValueError, match="last position"):
        drop_tokens(prompt, "last", 1)
    with pytest.raises(ValueError, match="no image's"):
        mask_image(prompt, "question")
    for hooks, message in (
        (ablate(heads=[(0, 4)]), "has heads 0..3, got 4"),
        (ablate(heads=[(99, 0)]), "no hook point is called"),
        (ablate(neurons=[(0, -1)]), "has neurons 0..71, got -1"),
        (steer(torch.ones(3), [0]), "dimensions, the direction 3"),
        (drop_tokens(prompt, "image", model.cfg.n_layers), "must be in 1.."),
        (redirect_attention(prompt, [(0, 0)], "image", 0.5, [0]), "sees no token of the place"),
        (ablate(heads=[(0, 0)], positions="image", inputs=other), "made for a prompt whose positions"),
        (drop_tokens(other, "image", 1), "made for a prompt whose positions"),
        (hide(other, "image"), "made for a prompt whose positions"),
        (ablate(mlps=[0], how="mean", reference={}), "the reference has no blocks.0.hook_mlp_out"),
    ):
        with pytest.raises(ValueError, match=message):
            logits(model, prompt, hooks)


def test_lists_add_up():
    first, second = ablate(heads=[(0, 0)]), scale_heads({(1, 1): 2.0})
    assert isinstance(first + second, Interventions) and list(first + second) == [*first, *second]
    assert isinstance(list(first) + second, Interventions)
    assert hook_names(heads=[(0, 1), (0, 2)], layers=[1]) == ["blocks.0.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
