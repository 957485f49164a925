"""Bare tokens with padding: each row gives what it gives alone, on whichever side it is padded, in every function."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_hf, tiny_processor, tiny_tokenizer
from transformer_lens import patching, utilities

from analyses.logit_lens import logit_lens
from analyses.patching import patch_sweep
from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.inputs import padding_mask

CLOSE = 1e-4  # logits of a spread of 1 to 3; measured 4e-6
TEXTS = ["the red", "какого цвета круг?", "圆是红色的吗 blue"]
SIDES = ["left", "right", "both"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.fixture(scope="module")
def small():
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2), tiny_processor())


@pytest.fixture(scope="module")
def alone(small):
    return [small.to_tokens(text) for text in TEXTS]


def padded(rows, side, pad):
    """[batch pos] and where the tokens are; "both" pads each row on the left by its number of a kind, on the right by the rest."""
    width = max(row.shape[1] for row in rows)
    tokens = torch.full((len(rows), width), pad)
    places = []
    for n, row in enumerate(rows):
        length = row.shape[1]
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        tokens[n, start : start + length] = row[0]
        places.append(slice(start, start + length))
    return tokens, places


@pytest.fixture(scope="module", params=SIDES)
def ragged(request, small, alone):
    return padded(alone, request.param, small.tokenizer.pad_token_id)


def test_forward_cache_and_loss(small, alone, ragged):
    tokens, places = ragged
    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern", "hook_embed"]
    with torch.no_grad():
        logits, cache = small.run_with_cache(tokens, names_filter=names)
        both = small(tokens, return_type="both", loss_per_token=True)
        mean = small.loss_fn(logits, tokens)
        ours = []
        for row, (own, at) in enumerate(zip(alone, places)):
            expected, own_cache = small.run_with_cache(own, names_filter=names)
            assert (logits[row, at] - expected[0]).abs().max() < CLOSE
            assert (cache[names[0]][row, at] - own_cache[names[0]][0]).abs().max() < CLOSE
            assert (cache[names[1]][row][:, at, at] - own_cache[names[1]][0]).abs().max() < CLOSE
            loss = small(own, return_type="loss", loss_per_token=True)[0]
            assert (both[1][row, at.start : at.stop - 1] - loss).abs().max() < CLOSE
            ours.append(loss)
        assert abs(mean - torch.cat(ours).mean()) < CLOSE
        wrong = small(tokens, attention_mask=torch.ones_like(tokens))
    assert (wrong[0, places[0]] - logits[0, places[0]]).abs().max() > 1e-2 or places[0].start == 0  # the fault would be seen


def test_generation(small, alone, ragged):
    tokens, _ = ragged
    settings = {
        "greedy": {}, "uncached": {"use_past_kv_cache": False}, "repeating less": {"repetition_penalty": 1.7},
        "top 1 of fewer": {"do_sample": True, "top_k": 1, "freq_penalty": 0.5},
    }  # fmt: skip
    for kind, more in settings.items():
        ours = small.generate(tokens, **GREEDY | more)
        streamed = torch.cat(list(small.generate_stream(tokens, max_tokens_per_yield=2, **GREEDY | more)), dim=1)
        assert torch.equal(ours, streamed)
        for row, own in enumerate(alone):
            assert torch.equal(ours[row, -6:], small.generate(own, **GREEDY | more)[0, -6:]), (kind, row)


def test_sampling_with_a_seed(small, ragged):
    """Whatever the padding: what the texts themselves give; penalties do not count it."""
    settings = {"max_new_tokens": 6, "verbose": False, "stop_at_eos": False, "temperature": 1.3, "seed": 5, "freq_penalty": 0.3}
    ours = small.generate(ragged[0], **settings)[:, -6:]
    assert torch.equal(ours, small.generate(TEXTS, return_type="tokens", **settings)[:, -6:])
    assert not torch.equal(ours, small.generate(TEXTS, return_type="tokens", **settings | {"seed": 6})[:, -6:])


def test_sweeps_and_lens(small, alone, ragged):
    tokens, places = ragged
    other, rows = tokens.clone(), range(len(places))
    for row, at in enumerate(places):
        other[row, at.stop - 1] = 65

    def metric(logits):
        return torch.stack([logits[row, places[row].stop - 1, 70] for row in rows])

    with torch.no_grad():
        _, cache = small.run_with_cache(tokens)
        cells = patching.get_act_patch_resid_pre(small, other, cache, metric, reduce="none").values
        for row, at in enumerate(places):
            _, own_cache = small.run_with_cache(tokens[[row], at])
            own = patching.get_act_patch_resid_pre(small, other[[row], at], own_cache, lambda logits: logits[0, -1, 70])
            assert (cells[:, at, row] - own).abs().max() < CLOSE
            ours = logit_lens(small, tokens, positions="last", row=row, top_k=3)
            theirs = logit_lens(small, alone[row], positions="last", top_k=3)
            assert torch.equal(ours.top_ids, theirs.top_ids) and torch.allclose(ours.top_probs, theirs.top_probs, atol=CLOSE)


def test_rows_of_our_own_sweep(small, alone):
    """Left-padded, as its metric position asks for."""
    tokens, places = padded(alone, "left", small.tokenizer.pad_token_id)
    other = tokens.clone()
    other[:, -1] = 65

    def sweep(*prompts):
        return patch_sweep(small, *map(small.as_inputs, prompts), lambda logits: logits[:, -1, 70], progress=False).values

    together = sweep(tokens, other)
    for row, at in enumerate(places):
        assert (together[:, at, row] - sweep(tokens[[row], at], other[[row], at])[..., 0]).abs().max() < CLOSE


def test_both_rescues_of_transformer_lens(small):
    """`get_attention_mask` by the tokenizer's side, and `padding_side=`: the tokens and the tokenizer say the same."""
    own = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), tiny_processor())
    with torch.no_grad():
        for side in ("left", "right"):
            own.tokenizer.padding_side = side
            tokens = own.to_tokens(TEXTS)
            assert torch.equal(tokens, small.to_tokens(TEXTS, padding_side=side))
            mask = utilities.get_attention_mask(own.tokenizer, tokens, False)
            assert torch.equal(mask, own.as_inputs(tokens).attention_mask)
            assert torch.equal(own(tokens), own(tokens, attention_mask=mask))
            assert torch.equal(own(tokens), own(TEXTS)) and torch.equal(own(tokens), small(TEXTS, padding_side=side))
    with pytest.raises(ValueError, match="'left', 'right' or None"):
        small(TEXTS, padding_side="top")


def test_a_tokenizer_that_says_right_is_the_callers_own():
    theirs = tiny_tokenizer()
    theirs.padding_side = "right"
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=1), tiny_processor(tokenizer=theirs))
    assert model.to_tokens(TEXTS)[0, 0] == theirs.pad_token_id and theirs.padding_side == "right"


PAD = 9


@pytest.mark.parametrize(
    ("tokens", "where"),
    [
        ([[PAD, 1, 2]], "begins"),
        ([[PAD, 1, 2], [PAD, PAD, 3]], "begins"),
        ([[1, 2, PAD]], "ends"),
        ([[PAD, 1, 2], [3, PAD, 4]], "inside"),
        ([[PAD, PAD]], "begins"),
    ],
)
def test_padding_that_could_be_text_is_asked_about(tokens, where):
    tokens = torch.tensor(tokens)
    with pytest.raises(ValueError, match=rf"{where}.*attention_mask="):
        padding_mask(tokens, PAD)
    assert padding_mask(tokens, None).all()


def test_padding_that_is_plain():
    tokens = torch.tensor([[PAD, 1, 2, 3], [4, 5, PAD, PAD], [6, 7, 8, 1]])
    assert padding_mask(tokens, PAD).tolist() == [[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert padding_mask(tokens, PAD, "left").tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert padding_mask(torch.tensor([[1, PAD, 2]]), PAD).all()  # inside a row it is text
    assert padding_mask(torch.tensor([[PAD, 1, PAD, 2]]), PAD, "left").tolist() == [[0, 1, 1, 1]]


def test_it_is_asked_about_in_the_model(small):
    tokens = torch.tensor([[small.tokenizer.pad_token_id, 65, 66]])
    with torch.no_grad():
        for run in (small, small.run_with_cache, small.generate, lambda x: list(small.generate_stream(x))):
            with pytest.raises(ValueError, match="attention_mask="):
                run(tokens)
        as_text = small(tokens, attention_mask=torch.ones_like(tokens))
        as_padding = small(tokens, padding_side="left")
        assert torch.allclose(as_padding[:, 1:], small(tokens[:, 1:]), atol=CLOSE)
    assert (as_text[:, 1:] - as_padding[:, 1:]).abs().max() > 1e-2
    mask = torch.tensor([[0, 1, 1]])
    assert torch.equal(small.generate(tokens, attention_mask=mask, **GREEDY)[:, 3:], small.generate(tokens[:, 1:], **GREEDY)[:, 2:])


def test_a_processors_batch_without_its_mask(small, alone):
    tokens, _ = padded(alone, "left", small.tokenizer.pad_token_id)
    assert Inputs.from_processor({"input_ids": tokens}, small.cfg) == small.as_inputs(TEXTS)


def test_bos_is_explained_once():
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=1), tiny_processor())
    with pytest.warns(UserWarning, match="no BOS") as said:
        with_bos = model.to_tokens("red", prepend_bos=True)
        with torch.no_grad():
            model("red", prepend_bos=True), model.run_with_cache("red", prepend_bos=True)
    assert torch.equal(with_bos, model.to_tokens("red")) and len(said) == 1
