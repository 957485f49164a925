"""Greedy decoding against transformers' generate, and hooks during decoding."""

from __future__ import annotations

import pytest
import torch
from conftest import prompts
from tiny import reference_batch, tiny_hf
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.generate import KeysAndValues

NEW = 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "verbose": False}


def reference_tokens(hf, inputs, **changes):
    hf.model.rope_deltas = None
    return hf.generate(**reference_batch(inputs), max_new_tokens=NEW, do_sample=False, **changes)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_the_reference(seed, cached, processor):
    """Five random configurations, fifty prompts, cached and uncached: every token."""
    hf = tiny_hf(seed=seed, n_key_value_heads=(1, 2, 4, 2, 1)[seed], tie=seed % 2 == 1, n_layers=(3, 3, 2, 4, 1)[seed])
    model = HookedQwen2VL.from_hf(hf, processor)
    for kind, inputs in prompts(model).items():
        ours = model.generate(inputs, return_type="tokens", use_past_kv_cache=cached, **GREEDY)
        assert torch.equal(ours, reference_tokens(hf, inputs)), kind


@pytest.mark.parametrize("room", [0, 3, 128])
def test_keys_and_values_are_transformer_lens_s(room, model, monkeypatch):
    """However often room is made anew, and frozen or not: what its entry gives, and what was given before stays."""
    monkeypatch.setattr("hooked_qwen2vl.generate.ROOM", room)
    ours, theirs = (kind.init_cache_entry(model.cfg, "cpu", 2) for kind in (KeysAndValues, TransformerLensKeyValueCacheEntry))
    given = []
    for n in (5, 1, 1, 1, 4, 1):
        new = torch.randn(2, 2, n, model.cfg.n_key_value_heads, model.cfg.d_head)
        for frozen in (True, False):
            ours.frozen = theirs.frozen = frozen
            given.append((ours.append(*new), theirs.append(*new)))
    for mine, expected in given:
        assert all(torch.equal(a, b) for a, b in zip(mine, expected))
    assert torch.equal(ours.past_keys, theirs.past_keys) and torch.equal(ours.past_values, theirs.past_values)


@pytest.mark.parametrize("kind", ["image", "batch"])
def test_greedy_when_room_runs_out(kind, model, hf, batches, monkeypatch):
    monkeypatch.setattr("hooked_qwen2vl.generate.ROOM", 3)
    ours = model.generate(batches[kind], return_type="tokens", stop_at_eos=False, **GREEDY)
    assert torch.equal(ours, reference_tokens(hf, batches[kind], eos_token_id=-1))


def test_rows_end_at_the_end_token(model, hf, batches):
    """Any token may end a row: choose one that the model says, and compare what follows it."""
    inputs = batches["batch"]
    free = reference_tokens(hf, inputs, eos_token_id=-1)
    end = int(free[0, inputs.shape[1] + 2])
    ours = model.generate(inputs, return_type="tokens", eos_token_id=end, **GREEDY)
    theirs = reference_tokens(hf, inputs, eos_token_id=end)
    assert torch.equal(ours[:, : theirs.shape[1]][theirs != 0], theirs[theirs != 0])
    assert ours.shape == theirs.shape


def test_the_cache_covers_the_generated_tokens(model, batches):
    """What was collected step by step is what one run over the whole sequence gives."""
    names = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_pattern", "ln_final.hook_normalized"]
    for kind in ("image", "batch"):
        done, stepwise = model.generate(
            batches[kind], return_type="inputs", return_cache=True, names_filter=names, stop_at_eos=False, **GREEDY
        )
        with torch.no_grad():
            _, whole = model.run_with_cache(done, names_filter=names)
        for name in names:
            assert stepwise[name].shape == whole[name].shape
            assert torch.allclose(stepwise[name], whole[name], atol=1e-5), (kind, name)


def test_hooks_act_at_every_step(model, batches):
    """Zeroing the last block's input each time gives the same token each time."""
    lengths = []

    def zero(activation, hook):
        lengths.append(activation.shape[1])
        return activation * 0

    done = model.generate(
        batches["image"],
        return_type="tokens",
        fwd_hooks=[("ln_final.hook_normalized", zero)],
        stop_at_eos=False,
        **GREEDY,
    )
    assert lengths == [batches["image"].shape[1]] + [1] * (NEW - 1)
    assert set(done[0, batches["image"].shape[1] :].tolist()) == {0}


def test_a_generated_placeholder_is_text(model, batches):
    """Forcing image placeholders out of the model neither asks for images nor moves positions."""
    inputs = batches["image"]
    image = model.cfg.image_token_id

    def force(normalized, hook):
        out = torch.zeros_like(normalized)
        return out + 1e4 * model.W_U[:, image] / model.ln_final.w

    for cached in (True, False):
        done = model.generate(
            inputs,
            return_type="inputs",
            fwd_hooks=[("ln_final.hook_normalized", force)],
            use_past_kv_cache=cached,
            **GREEDY,
        )
        new = slice(inputs.shape[1], None)
        assert (done.tokens[0, new] == image).all()
        assert (done.token_types[0, new] == 0).all()
        assert done.position_ids[0, 0, new].diff().eq(1).all()


def test_sampling_is_repeatable(model, batches):
    settings = {"max_new_tokens": 8, "temperature": 1.5, "return_type": "tokens", "verbose": False}
    first = model.generate(batches["image"], seed=3, **settings)
    torch.rand(5)
    assert torch.equal(first, model.generate(batches["image"], seed=3, **settings))
    assert not torch.equal(first, model.generate(batches["image"], seed=4, **settings))


def test_streaming_says_the_same(model, batches):
    inputs = batches["image"]
    whole = model.generate(inputs, return_type="tokens", **GREEDY)[:, inputs.shape[1] :]
    settings = {key: value for key, value in GREEDY.items() if key != "verbose"}
    pieces = list(model.generate_stream(inputs, return_type="tokens", max_tokens_per_yield=3, **settings))
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert "".join(model.generate_stream(inputs, **settings)) == model.generate(inputs, return_type="str", **GREEDY)


def test_contradictory_settings_are_refused(model, batches):
    with pytest.raises(ValueError, match="exclude each other"):
        model.generate(batches["image"], top_k=3, top_p=0.5)
    with pytest.raises(ValueError, match="do not fit the context"):
        model.generate(batches["image"], max_new_tokens=10_000)


@pytest.mark.parametrize("seed", range(4))
def test_padding_on_the_right_is_moved(seed, processor):
    """A right-padded batch goes on as the left-padded one does; without the move two of these four models differ."""
    model = HookedQwen2VL.from_hf(tiny_hf(seed=seed), processor)
    left = model.to_inputs(["what?", "which of the two is red?"])
    rows = [row.tokens[0][row.attention_mask[0].bool()] for row in left]
    width = left.shape[1]
    tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (0, width - len(row))) for row in rows])
    right = Inputs.from_tokens(tokens, model.cfg, mask)
    ours, expected = (model.generate(x, return_type="tokens", stop_at_eos=False, **GREEDY) for x in (right, left))
    assert torch.equal(ours[:, -NEW:], expected[:, -NEW:])


def test_tokens_and_inputs_pass_through_to_tokens(model, batches):
    assert model.to_tokens(batches["image"]) is batches["image"]
    assert torch.equal(model.to_tokens(batches["text"].tokens), batches["text"].tokens)
