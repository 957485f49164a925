"""Knockout: the identity that must hold, hand-made masks, and cached generation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from tiny import tiny_hf

from analyses.knockout import Knockout, attention_knockout, knockout_hooks, layers_around
from hooked_qwen2vl import HookedQwen2VL

RED = 258


@pytest.fixture(scope="module")
def pair(model):
    return tuple(model.to_inputs("is it red?", images=[picture(84, 56, seed)]) for seed in (1, 2))


def after_image(inputs):
    return range(int(inputs.positions("image")[-1]) + 1, inputs.shape[1])


def test_blocking_the_image_everywhere_hides_it(model, pair):
    every = range(model.cfg.n_layers)
    with torch.no_grad():
        one, two = (model.run_with_hooks(x, fwd_hooks=knockout_hooks(x, "image", after_image(x), every)) for x in pair)
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


def test_windows_that_are_none(model, pair):
    """1..L layers at once; by default a quarter of them, at least one."""
    n_layers = model.cfg.n_layers
    for window in (0, -1, n_layers + 1):
        with pytest.raises(ValueError, match=f"window must be in 1..{n_layers}, got {window}"):
            attention_knockout(model, pair[0], [RED], window=window, only_correct=False, progress=False)
    for window, expected in ((1, 1), (n_layers, n_layers), (None, max(1, round(n_layers / 4)))):
        result = attention_knockout(model, pair[0], [RED], {"f": ("image", "last")}, window, only_correct=False, progress=False)
        assert result.window == expected


@pytest.mark.parametrize(("n_layers", "window"), [(1, 1), (6, 2), (10, 2), (11, 3)])
def test_a_quarter_of_the_layers(processor, n_layers, window):
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=n_layers), processor)
    x = model.to_inputs("red?", images=[picture(56, 56)])
    result = attention_knockout(model, x, [RED], {"f": ("image", "last")}, only_correct=False, progress=False)
    assert result.window == window and result.effects.shape == (1, n_layers, 1)


def test_several_queries_behind_a_cache(model):
    """Where keys come from a cache, the queries are the last positions: by hand, for a chunk of three of eight."""
    inputs = model.to_inputs(" ".join(["red"] * 8), template=False)
    assert inputs.shape[1] == 8
    ((_, hook),) = knockout_hooks(inputs, [0, 2], [5, 7], [0])
    scores = hook(torch.zeros(1, 2, 3, 8), SimpleNamespace(name="x"))
    expected = torch.zeros(3, 8)
    expected[0, [0, 2]] = expected[2, [0, 2]] = float("-inf")
    assert torch.equal(scores, expected.expand(1, 2, 3, 8))


def a_result(n, seed=0, **changes):
    effects = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed))
    images = tuple(f"{seed}:{i}" for i in range(n))
    made = Knockout(effects, torch.rand(n), ("a", "b"), 1, n, "m", images)
    return replace(made, **changes)


def test_results_are_joined():
    one, two = a_result(2, 1), a_result(5, 2)
    joined = Knockout.join([one, a_result(0), two])
    assert torch.equal(joined.effects, torch.cat((one.effects, two.effects), 2)) and joined.effects.shape == (2, 3, 7)
    assert torch.equal(joined.baseline, torch.cat((one.baseline, two.baseline)))
    assert joined.skipped == 7 and joined.images == one.images + two.images
    assert set(joined.to_dataframe()["items"]) == {7}
    unnamed = Knockout.join([replace(one, images=()), replace(two, images=())])
    assert unnamed.images == ()
    with pytest.raises(ValueError, match="no effect to measure"):
        Knockout.join([a_result(0), a_result(0)])
    with pytest.raises(ValueError, match="1 of 2 results name the images"):
        Knockout.join([one, replace(two, images=())])
    for other in ({"flows": ("a", "c")}, {"window": 2}, {"model_name": "another"}):
        with pytest.raises(ValueError, match="one model, the same flows and one window"):
            Knockout.join([one, replace(two, **other)])


def test_the_picture(model, pair, tmp_path):
    with torch.no_grad():
        answer = int(model(pair[0])[0, -1].argmax())
    attention_knockout(model, pair[0], [answer], progress=False).plot(tmp_path / "knockout.png")
    assert (tmp_path / "knockout.png").stat().st_size > 0
