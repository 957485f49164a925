"""Greedy decoding against transformers' generate, and hooks during decoding."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import prompts
from tiny import reference_batch, tiny_hf
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformers.generation import StopStringCriteria

from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.generate import KeysAndValues, StopStrings

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


@pytest.mark.parametrize("spare", [0, 3, 128])
def test_keys_and_values_are_transformer_lens_s(spare, model, monkeypatch):
    """However often the buffer is made anew, and frozen or not: what the cache gives, and what was given before stays."""
    monkeypatch.setattr("hooked_qwen2vl.generate.SPARE", spare)
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
    monkeypatch.setattr("hooked_qwen2vl.generate.SPARE", 3)
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


@pytest.mark.parametrize("per_chunk", [1, 3, 25, 1000])
@pytest.mark.parametrize("kind", ["inputs", "batch", "text", "texts", "tokens"])
def test_streaming_says_the_same(kind, per_chunk, model, batches):
    """Chunks put together are what `generate` returns, the prompt in the first one."""
    prompt = {
        "inputs": batches["image"], "batch": batches["batch"], "text": "the red", "texts": ["the red", "blue"],
        "tokens": model.to_tokens("the red"),
    }[kind]  # fmt: skip
    pieces = list(model.generate_stream(prompt, return_type="tokens", max_tokens_per_yield=per_chunk, **GREEDY))
    assert torch.equal(torch.cat(pieces, dim=1), model.generate(prompt, return_type="tokens", **GREEDY))
    widths = [piece.shape[1] for piece in pieces]
    assert all(width == per_chunk for width in widths[1:-1]) and widths[0] > model.to_tokens(prompt).shape[1] if len(widths) > 1 else True
    texts = list(model.generate_stream(prompt, return_type="str", max_tokens_per_yield=per_chunk, **GREEDY))
    whole = model.generate(prompt, return_type="str", **GREEDY)
    joined = "".join(texts) if isinstance(whole, str) else ["".join(row) for row in zip(*texts)]
    assert joined == whole
    first = next(iter(model.generate_stream(prompt, **GREEDY)))
    assert isinstance(first, {"tokens": torch.Tensor, "inputs": str, "text": str}.get(kind, list))


def test_the_stream_has_transformer_lens_s_arguments(model):
    """Names, order and defaults, but for our own (keyword only) and what is refused."""
    from transformer_lens.model_bridge import TransformerBridge

    for name in ("generate", "generate_stream"):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (HookedQwen2VL, TransformerBridge))
        shared = [p for p in theirs if p != "multimodal_kwargs"]
        assert list(ours)[: len(shared)] == shared, name
        assert {p: ours[p].default for p in shared} == {p: theirs[p].default for p in shared}
        assert {p for p in ours if p not in theirs} == {"fwd_hooks", "seed"}


def test_logits_and_input_tokens(model, batches):
    """Beside the continuation: the logits each token was chosen from, and the prompt as it was run."""
    inputs = batches["batch"]
    whole = model.generate(inputs, return_type="tokens", stop_at_eos=False, **GREEDY)
    output, cache, tokens = model.generate(
        inputs, output_logits=True, return_cache=True, names_filter="hook_embed", return_input_tokens=True, stop_at_eos=False, **GREEDY
    )
    assert torch.equal(output.sequences, whole) and torch.equal(tokens, inputs.tokens) and len(output.logits) == NEW
    assert torch.equal(torch.stack(output.logits, 1).argmax(-1), whole[:, -NEW:])
    assert cache["hook_embed"].shape[:2] == whole.shape
    done = model.generate(inputs, return_type="inputs", stop_at_eos=False, **GREEDY)
    with torch.no_grad():
        assert torch.allclose(torch.stack(output.logits, 1), model(done)[:, -NEW - 1 : -1], atol=1e-4)
    text, tokens = model.generate("the red", return_input_tokens=True, **GREEDY)
    assert isinstance(text, str) and torch.equal(tokens, model.to_tokens("the red"))


@pytest.mark.parametrize("refused", ["pixel_values", "forced_bos_token_id"])
def test_refused_by_name(refused, model):
    with pytest.raises(ValueError, match=f"{refused}="):
        model.generate("the red", **{refused: 3})


def test_stop_strings_are_transformers_(model):
    """Row by row what transformers' criterion says, halves of characters and all; no stop strings stop nothing."""
    tokenizer = model.tokenizer
    text = "the red thing is é blue, 圆 red"
    tokens = model.to_tokens(text)[0]
    for strings in (["red"], ["d t"], ["ue,", "é"], ["圆"], ["e"], ["is é b"], ["nothing of it"], [" red"]):
        ours, theirs = StopStrings(tokenizer, strings), StopStringCriteria(tokenizer, strings)
        said = []
        for end in range(1, len(tokens) + 1):
            rows = torch.stack([tokens[:end], tokens[:end].roll(1)])
            expected = theirs(rows, None)
            assert torch.equal(ours(rows, None), expected), (strings, tokenizer.decode(tokens[:end]))
            said.append(bool(expected[0]))
        assert any(said) == (strings != ["nothing of it"])
    for nothing in ([], "", None, [""]):
        ours = model.generate("the red", stop_strings=nothing, stop_at_eos=False, **GREEDY)
        assert ours == model.generate("the red", stop_at_eos=False, **GREEDY)
    whole = model.generate(tokens[None], stop_at_eos=False, **GREEDY)
    stop = tokenizer.decode(whole[0, -NEW : -NEW + 1])
    assert model.generate(tokens[None], stop_at_eos=False, stop_strings=stop, **GREEDY).shape[1] == len(tokens) + 1


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
