"""Knockout: the identity that must hold, hand-made masks, and cached generation."""

from __future__ import annotations

import pytest
import torch
from conftest import picture

from analyses.knockout import attention_knockout, knockout_hooks, layers_around


@pytest.fixture(scope="module")
def pair(model):
    return tuple(model.to_inputs("is it red?", images=[picture(84, 56, seed)]) for seed in (1, 2))


def after_image(inputs):
    return range(int(inputs.positions("image")[-1]) + 1, inputs.shape[1])


def test_blocking_the_image_everywhere_hides_it(model, pair):
    every = range(model.cfg.n_layers)
    with torch.no_grad():
        one, two = (
            model.run_with_hooks(x, fwd_hooks=knockout_hooks(x, "image", after_image(x), every)) for x in pair
        )
        places = list(after_image(pair[0]))
        assert torch.equal(one[:, places], two[:, places])
        one, two = (model.run_with_hooks(x, fwd_hooks=knockout_hooks(x, "image", "last", every)) for x in pair)
    assert (one[:, -1] - two[:, -1]).abs().max() > 1e-4


def test_effects_by_hand(model, pair):
    with torch.no_grad():
        base = model(pair[0])[0, -1].softmax(-1)
        answer = int(base.argmax())
        result = attention_knockout(model, pair[0], [answer], {"image→last": ("image", "last")}, window=1, progress=False)
        image = pair[0].positions("image")
        for layer in range(model.cfg.n_layers):

            def hide(pattern, hook):
                kept = pattern.clone()
                kept[:, :, -1, image] = 0
                return kept / kept.sum(-1, keepdim=True)

            new = model.run_with_hooks(pair[0], fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", hide)])[0, -1].softmax(-1)
            expected = 100 * (new[answer] - base[answer]) / base[answer]
            assert abs(result.effects[0, layer, 0] - expected) < 1e-2
    assert result.skipped == 0 and len(result.to_dataframe()) == model.cfg.n_layers


def test_wrong_answers_are_skipped_and_counted(model, pair):
    with torch.no_grad():
        wrong = int(model(pair[0])[0, -1].argmin())
    result = attention_knockout(model, pair[0], [wrong], progress=False)
    assert result.skipped == 1 and result.effects.shape[-1] == 0


def test_in_cached_generation(model, pair):
    """Hiding the image from prompt and continuation: two images of one grid are continued alike, cached or not."""
    settings = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    outputs = []
    for x in pair:
        hooks = knockout_hooks(x, "image", after_image(x), range(model.cfg.n_layers), generated=True)
        for cached in (True, False):
            outputs.append(model.generate(x, fwd_hooks=hooks, use_past_kv_cache=cached, **settings)[:, -5:])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_query_without_keys_is_an_error(model, pair):
    with pytest.raises(ValueError, match="no key"):
        hooks = knockout_hooks(pair[0], range(pair[0].shape[1]), "last", [0])
        model.run_with_hooks(pair[0], fwd_hooks=hooks)


def test_windows_are_clipped():
    assert [list(layers_around(c, 3, 4)) for c in range(4)] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert list(layers_around(2, 2, 8)) == [2, 3]


def test_the_picture(model, pair, tmp_path):
    with torch.no_grad():
        answer = int(model(pair[0])[0, -1].argmax())
    attention_knockout(model, pair[0], [answer], progress=False).plot(tmp_path / "knockout.png")
    assert (tmp_path / "knockout.png").stat().st_size > 0
