"""A cache on disk comes back as it was, and is refused where it does not belong."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_hf
from transformer_lens import ActivationCache

from hooked_qwen2vl import HookedCache, HookedQwen2VL, cache_image


def run(model, inputs, **settings):
    with torch.no_grad():
        return model.run_with_cache(inputs, **settings)[1]


@pytest.mark.parametrize("kind", ["image", "batch", "text"])
def test_a_cache_comes_back_as_it_was(model, batches, tmp_path, kind):
    """Every name in its order, every value, dtype and shape, text and vision side."""
    cache = run(model, batches[kind], vision=True)
    back = HookedCache.load(cache.save(tmp_path / "deep" / "run.safetensors"), model)
    assert isinstance(back, ActivationCache) and back.model is model and back.has_batch_dim
    for ours, theirs in ((back.cache_dict, cache.cache_dict), (back.vision, cache.vision)):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    assert bool(back.vision) == (kind != "text")


def test_it_works_as_the_cache_it_was(model, batches, tmp_path):
    inputs = batches["image"]
    cache = run(model, inputs, vision=True)
    back = HookedCache.load(cache.save(tmp_path / "run.safetensors"), model)
    with torch.no_grad():
        for ask in (
            lambda c: c.accumulated_resid(apply_ln=True, incl_mid=True),
            lambda c: c.decompose_resid(apply_ln=True),
            lambda c: c.stack_head_results(layer=2),
            lambda c: c.apply_slice_to_batch_dim(0)["resid_post", -1],
            lambda c: cache_image(c, "vision_encoder.blocks.1.hook_resid_post", inputs),
        ):
            assert torch.equal(ask(back), ask(cache))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_settings(processor, tmp_path, dtype):
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=dtype), processor)
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    cache = run(model, inputs, remove_batch_dim=True, pos_slice=slice(2, 9))
    back = HookedCache.load(cache.save(tmp_path / "run.safetensors"), model)
    assert not back.has_batch_dim and back["resid_pre", 1].shape == (7, model.cfg.d_model)
    assert back["resid_pre", 1].dtype == dtype
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in cache.items())


def test_a_shared_tensor_is_stored_once(model, batches, tmp_path):
    """The stream after a block is the stream before the next: one tensor in memory, on disk, and back in memory."""
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"]
    cache = run(model, batches["image"], names_filter=names)
    path = cache.save(tmp_path / "run.safetensors")
    assert sorted(load_file(path)) == [names[0], names[2], "prompt.attention_mask", "prompt.position_ids"]
    back = HookedCache.load(path, model)
    assert list(back.keys()) == names
    assert back[names[0]].data_ptr() == back[names[1]].data_ptr() != back[names[2]].data_ptr()


def test_views_of_one_tensor_stay_apart(model, batches, tmp_path):
    """Rows of a batch are views of its activations; overlapping ones are not mistaken for each other."""
    whole = run(model, batches["batch"], names_filter="blocks.1.hook_resid_pre")["blocks.1.hook_resid_pre"]
    parts = {"blocks.0.hook_resid_pre": whole[:2], "blocks.1.hook_resid_pre": whole[1:3], "blocks.2.hook_resid_pre": whole}
    back = HookedCache.load(HookedCache(parts, model).save(tmp_path / "run.safetensors"), model)
    assert all(torch.equal(back[name], value) for name, value in parts.items())


def test_a_loaded_cache_may_be_edited_and_saved_over_its_own_file(model, batches, tmp_path):
    """What is mapped from a file is not written back by an edit, and survives the file's replacement."""
    path = run(model, batches["image"], names_filter="blocks.1.hook_resid_pre").save(tmp_path / "run.safetensors")
    back = HookedCache.load(path, model)
    expected = back["blocks.1.hook_resid_pre"] + 1
    back["blocks.1.hook_resid_pre"].add_(1)
    assert not torch.equal(HookedCache.load(path, model)["blocks.1.hook_resid_pre"], expected)
    back.save(path)
    assert torch.equal(HookedCache.load(path, model)["blocks.1.hook_resid_pre"], expected)
    assert torch.equal(back["blocks.1.hook_resid_pre"], expected)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"n_layers": 2}, {"n_heads": 2}, {"vision_layers": 3}, {"n_key_value_heads": 4}])
def test_another_models_cache_is_refused(model, batches, tmp_path, change):
    path = run(model, batches["image"], names_filter="blocks.1.hook_resid_pre").save(tmp_path / "run.safetensors")
    other = HookedQwen2VL.from_hf(tiny_hf(**change))
    with pytest.raises(ValueError, match="whose shape is another"):
        HookedCache.load(path, other)
    twin = HookedQwen2VL.from_hf(tiny_hf(seed=3))
    assert HookedCache.load(path, twin).model is twin


def test_what_is_not_a_cache_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        HookedCache.load(tmp_path / "nothing.safetensors", model)
    (tmp_path / "text.safetensors").write_text("not a cache")
    with pytest.raises(ValueError, match="cannot be read"):
        HookedCache.load(tmp_path / "text.safetensors", model)
    save_file({"blocks.0.hook_resid_pre": torch.zeros(1, 2, 3)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="not a cache of this package"):
        HookedCache.load(tmp_path / "plain.safetensors", model)
    with pytest.raises(ValueError, match="nothing to save"):
        HookedCache({}, model).save(tmp_path / "empty.safetensors")


@pytest.mark.parametrize("positions", [-1, slice(3, 5), [2, 7]])
def test_kept_positions_do_not_hold_the_others(model, batches, positions):
    """A slice is a copy of its own: what it was cut from is freed."""
    cache = run(model, batches["image"], pos_slice=positions)
    whole = run(model, batches["image"])
    for name, value in cache.items():
        assert value.untyped_storage().nbytes() == value.nbytes, name
        axis = -2 if name.endswith(("attn_scores", "pattern")) else 1
        index = [positions] if isinstance(positions, int) else positions
        expected = whole[name].movedim(axis, 0)[index].movedim(0, axis)
        assert torch.equal(value, expected), name  # an int keeps its axis, as in TransformerLens


@pytest.mark.parametrize("field", ["model_shape", "stored", "has_batch_dim", "sliced", "model_name"])
def test_a_damaged_header_names_the_file(model, tmp_path, field):
    path = model.run_with_cache("red", names_filter="hook_embed")[1].save(tmp_path / "cache.safetensors")
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for said in ("{", "[" * 2000, "null", "[1]") if field != "model_name" else (None,):
        damaged = {**header, field: said}
        save_file(tensors, path, {name: value for name, value in damaged.items() if value is not None})
        with pytest.raises(ValueError, match="header is damaged") as error:
            HookedCache.load(path, model)
        assert str(path) in str(error.value) and len(str(error.value)) < 600
