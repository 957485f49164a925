"""The size of a cache before the run: every hook's bytes, on each model of the line; a cache without room is refused."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import picture
from tiny import LINE, tiny_hf, tiny_processor, tiny_processor3

import hooked_qwen2vl.cache_size as module
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cache_size import CacheSize, cache_size, free_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LINE)
def test_every_hooks_bytes_are_those_of_the_cache(family, dtype):
    processor = tiny_processor3() if family == "qwen3_vl" else tiny_processor()
    model = HookedQwen2VL.from_hf(tiny_hf(family=family, dtype=dtype), processor)
    inputs = model.to_inputs(["what?", "go on now"], images=[[picture(84, 56, 1)], [picture(56, 56, 2)]])
    for pos_slice in (None, -1, slice(3, 9)):
        _, cache = model.run_with_cache(inputs, names_filter=lambda name: True, pos_slice=pos_slice)
        held = {**cache.cache_dict, **cache.vision}
        wrong = {
            n: (int(cache_size(model, inputs, [n], pos_slice)), x.nbytes)
            for n, x in held.items()
            if cache_size(model, inputs, [n], pos_slice) != x.nbytes
        }
        assert not wrong and len(held) == len(model.hook_dict)
    _, cache = model.run_with_cache(inputs)
    unique = sum({x.untyped_storage().data_ptr(): x.nbytes for x in (*cache.cache_dict.values(), *cache.vision.values())}.values())
    size = model.cache_size(inputs)
    assert unique <= size <= 1.1 * unique and size == sum(size.by_hook.values())
    assert model.cache_size(inputs, "blocks.0.hook_resid_post") == cache["blocks.0.hook_resid_post"].nbytes
    assert model.cache_size("what?") < size < model.cache_size(inputs, vision=True)


def test_it_grows_with_the_square_and_says_what_is_largest(model):
    short, long = (model.to_inputs("what? " * n) for n in (10, 60))
    square = {
        name: model.cache_size(long).by_hook[name] / model.cache_size(short).by_hook[name] for name in model.cache_size(short).by_hook
    }
    ratio = long.shape[1] / short.shape[1]
    for name, growth in square.items():
        assert growth == pytest.approx(ratio**2 if name.endswith(("scores", "pattern")) else ratio), name
    assert re.fullmatch(r"[\d.]+ [kMG]?B \(largest: blocks.attn.hook_(attn_scores|pattern) .*\)", str(model.cache_size(long)))


def test_a_cache_without_room_is_refused_before_the_run(model, monkeypatch):
    inputs = model.to_inputs("what? " * 40)
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "free_bytes", lambda device: 10_000)
    ran = []
    monkeypatch.setattr(type(model), "run_blocks", lambda self, *args, **more: ran.append(1))
    with pytest.raises(
        ValueError, match=r"would hold .* kB|MB .*cpu has 10 kB free: leave scores and patterns out, names_filter=.*pos_slice=-1"
    ) as caught:
        model.run_with_cache(inputs)
    with pytest.raises(ValueError, match="name the activations that are needed"):
        model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_resid_post"))
    assert not ran and len(str(caught.value)) < 700
    monkeypatch.setattr(module, "free_bytes", lambda device: None)  # nobody says
    monkeypatch.undo()
    model.run_with_cache(inputs, names_filter="blocks.0.hook_resid_post", pos_slice=-1)


def test_what_is_free_is_a_number_of_this_machine():
    assert 1e6 < free_bytes(torch.device("cpu")) < 1e14 and free_bytes(torch.device("meta")) is None
    assert str(CacheSize({"a": 5, "b": 3_600_000_000})) == "3.6 GB (largest: b 3.6 GB, a 5 B)"
