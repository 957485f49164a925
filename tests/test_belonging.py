"""Things that do not belong together are refused: activations and prompts, image embeddings and pixels or weights, hooks and
threads; and numbers that are not finite."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from tiny import tiny_config, tiny_hf
from transformer_lens import patching

from analyses.contextual_lens import ground
from analyses.counterfactuals import blur_box, changed_positions, swap_box
from analyses.direct_path import direct_path_patch
from analyses.edge_attribution import edge_attribution
from analyses.explorer import explore
from analyses.logit_lens import logit_lens
from analyses.patching import patch_sweep
from hooked_qwen2vl import HookedCache, HookedQwen2VL, Processor, open_image
from hooked_qwen2vl.config import convert_config


def metric(logits):
    return logits[0, -1, 258] - logits[0, -1, 262]


def prompt(model, width, height, question="what?", seed=0):
    return model.encode(model.to_inputs(question, images=[picture(width, height, seed)]))


@pytest.fixture(scope="module")
def square(model):
    return prompt(model, 168, 168)


@pytest.mark.parametrize(
    "other, why",
    [
        (lambda m: prompt(m, 252, 112), "differ in grid or place"),  # 6×6 and 4×9 tokens: 36 both
        (lambda m: prompt(m, 168, 168, "what is it?"), "positions"),
        (lambda m: prompt(m, 196, 168), "positions"),
    ],
    ids=["grid", "question", "size"],
)
def test_a_cache_is_not_put_into_prompts_of_another_shape(model, square, other, why, tmp_path):
    other = other(model)
    _, cache = model.run_with_cache(square)
    loaded = HookedCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    functions = (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_head_out_all_pos, patching.get_act_patch_mlp_out)
    for held in (cache, loaded, copy.copy(cache)):
        for function in functions:
            with pytest.raises(ValueError, match=why):
                function(model, other, held, metric)
    put = partial(lambda x, hook, clean: clean, clean=cache["resid_mid", 1])
    with pytest.raises(ValueError, match=why):
        model.run_with_hooks(other, fwd_hooks=[("blocks.1.hook_resid_mid", put)])
    with pytest.raises(ValueError, match=why), model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", put)]):
        model(other)
    with pytest.raises(ValueError, match=why):
        patch_sweep(model, square, other, metric, progress=False)
    with pytest.raises(ValueError, match=why):
        edge_attribution(model, square, other, metric, progress=False)
    with pytest.raises(ValueError, match=why):
        direct_path_patch(model, other, cache, model.run_with_cache(other)[1], metric, (0, 0))
    with pytest.raises(ValueError, match=why):
        direct_path_patch(model, other, cache, cache, metric, (0, 0))


def test_what_belongs_together_runs_as_before(model, square):
    other = prompt(model, 168, 168, seed=1)
    _, cache = model.run_with_cache(square)
    ours = patching.get_act_patch_attn_head_out_all_pos(model, other, cache, metric)
    theirs = patching.get_act_patch_attn_head_out_all_pos(model, other, _Plain(cache), metric)
    assert torch.equal(ours, theirs)
    both = model.encode(model.to_inputs(["what?"] * 2, images=[[picture(168, 168, 1)], [picture(168, 168, 2)]]))
    put = partial(lambda x, hook, clean: clean.expand_as(x), clean=cache["resid_mid", 1])
    model.run_with_hooks(both, fwd_hooks=[("blocks.1.hook_resid_mid", put)])  # one prompt fits every row like it


class _Plain:
    """A cache that knows nothing of its prompts."""

    def __init__(self, cache):
        self.free = cache.without_prompt()

    def __getitem__(self, key):
        return self.free[key]


def test_the_named_way_out(model, square):
    """As Patchscopes moves one vector into another prompt."""
    other = prompt(model, 252, 112)
    _, cache = model.run_with_cache(square)

    def put(x, hook, clean):
        x[:, 3] = clean[:, -1]
        return x

    for given in (cache.without_prompt()["resid_pre", 2], cache["resid_pre", 2].clone()):
        hook = ("blocks.2.hook_resid_pre", partial(put, clean=given))
        assert not torch.equal(model.run_with_hooks(other, fwd_hooks=[hook]), model(other))


def test_activations_of_some_positions_are_not_put_into_all(model, square):
    _, cache = model.run_with_cache(square, pos_slice=slice(0, square.shape[1] - 1))
    with pytest.raises(ValueError, match="pos_slice"):
        patching.get_act_patch_resid_pre(model, square, cache, metric)


def test_rows_of_a_cache_keep_their_prompts(model):
    batch = model.to_inputs(["what?", "the red thing"], images=[[picture(84, 84)], [picture(56, 84)]])
    _, cache = model.run_with_cache(batch)
    row = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(row.prompt_shape.attention_mask, batch.attention_mask[1:])
    with pytest.raises(ValueError, match="padding|grid"):
        patching.get_act_patch_resid_pre(model, batch[0], row, metric)


def test_activations_in_generation(model, square):
    """A hook that carries an activation of the same prompt acts in the prefill of a generation."""
    _, cache = model.run_with_cache(prompt(model, 168, 168, seed=3))

    def put(x, hook, clean):
        return clean if x.shape[1] > 1 else x

    hooks = [("blocks.1.hook_resid_mid", partial(put, clean=cache["resid_mid", 1]))]
    options = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "stop_at_eos": False}
    model.generate(square, fwd_hooks=hooks, **options)
    with pytest.raises(ValueError, match="differ in grid"):
        model.generate(prompt(model, 252, 112), fwd_hooks=hooks, **options)


# ---- image embeddings -------------------------------------------------------------------------------


def stale(model, inputs, edit) -> bool:
    """Whether the edit changes the logits of the encoded inputs as it changes those of the inputs themselves."""
    encoded = model.encode(inputs)
    before = model(encoded)
    edit()
    after, fresh = model(encoded), model(inputs)
    assert not torch.allclose(before, fresh, atol=1e-4), "the edit changes nothing: it could not be seen"
    return not torch.allclose(after, fresh, atol=1e-6)


def own(**options) -> HookedQwen2VL:
    return HookedQwen2VL.from_hf(tiny_hf(**options))


@torch.no_grad()
def test_edited_weights_are_noticed(model):
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    hf = tiny_hf()
    ours = HookedQwen2VL.from_hf(hf)
    weight = ours.vision_encoder.blocks[1].mlp.fc2.weight
    assert not stale(ours, inputs, lambda: weight.mul_(1.5))
    assert not stale(ours, inputs, lambda: weight.data.mul_(1.5))
    assert not stale(ours, inputs, lambda: weight.detach().numpy().__imul__(1.5))
    assert not stale(ours, inputs, lambda: hf.model.visual.blocks[0].mlp.fc1.weight.data.mul_(1.5))
    assert not stale(ours, inputs, lambda: ours.vision_projector.fc2.bias.data.add_(0.5))
    with torch.inference_mode():
        inside = own()
        assert not stale(inside, inputs, lambda: inside.vision_encoder.blocks[0].attn.v_proj.weight.mul_(1.5))


@torch.no_grad()
def test_replaced_and_edited_pixels_are_noticed(model):
    first, second = (model.to_inputs("what?", images=[picture(84, 56, seed)]) for seed in (1, 2))
    encoded = model.encode(first)
    assert torch.allclose(model(replace(encoded, pixels=second.pixels)), model(second), atol=1e-6)
    both = model.encode(model.to_inputs(["what?"] * 2, images=[[picture(84, 56, 1)], [picture(84, 56, 2)]]))
    calls = count_tower_runs(model, lambda: [model(both[1]), model(both), model(both.repeat(2)), model(both[[1, 0]])])
    assert calls == 0  # rows keep what was computed
    swapped = replace(both, pixels=both.pixels.flip(0))
    assert count_tower_runs(model, lambda: model(swapped)) == 1
    encoded.pixels[3, 7] += 1
    assert count_tower_runs(model, lambda: model(encoded)) == 1


@torch.no_grad()
def test_a_precision_of_its_own(model):
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = model.encode(inputs)
        assert count_tower_runs(model, lambda: model(encoded)) == 0
    assert torch.equal(model(encoded), model(inputs))


def count_tower_runs(model, run) -> int:
    calls, tower = [], model.vision_encoder.forward
    model.vision_encoder.forward = lambda *args: calls.append(1) or tower(*args)
    try:
        run()
    finally:
        del model.vision_encoder.forward
    return len(calls)


# ---- numbers that are not finite --------------------------------------------------------------------

STAGES = {
    "vision_encoder.patch_embed.weight": r"vision_encoder\.patch_embed",
    "vision_encoder.blocks.1.mlp.fc1.weight": r"vision_encoder\.blocks\.1",
    "vision_projector.fc1.bias": "vision_projector",
    "embed.weight": "hook_embed",
    "blocks.0.attn.k_proj.bias": r"blocks\.0",
    "blocks.2.ln2.w": r"blocks\.2",
    "ln_final.w": "ln_final",
    "unembed.weight": "unembed",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_that_are_not_finite_are_named(model, dtype):
    ours = HookedQwen2VL.from_hf(tiny_hf(dtype=dtype), model.processor)
    inputs = ours.to_inputs("what?", images=[picture(56, 56)])
    calls = (lambda: ours(inputs), lambda: ours.generate(inputs, max_new_tokens=1, verbose=False))
    for number, (name, stage) in enumerate(STAGES.items()):
        weight = ours.get_parameter(name)
        place = int(inputs.tokens[0, 2]) if name == "embed.weight" else 0
        before = weight[place].clone()
        weight[place] = (float("nan"), float("inf"))[number % 2]
        for call in calls:
            with pytest.raises(ValueError, match=rf"^{stage} gave numbers that are not finite"):
                call()
        weight[place] = before
    assert ours(inputs).isfinite().all()


@torch.no_grad()
def test_pixels_and_edits_that_are_not_finite(model):
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    bad = inputs.pixels.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="pixels"):
        model(replace(inputs, pixels=bad))
    with pytest.raises(ValueError, match="pixels"):
        model.encode(replace(inputs, pixels=bad))

    def spoil(x, hook):
        x[:, 1, 0] = float("inf")
        return x

    with pytest.raises(ValueError, match=r"^blocks\.1 gave"):
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_mlp_out", spoil)])
    with pytest.raises(ValueError, match=r"the stream before blocks\.1"):
        stream = model(inputs, stop_at_layer=1)
        stream[0, 0, 0] = float("nan")
        model(stream, inputs=inputs, start_at_layer=1)
    model(inputs)  # and nothing is left behind


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "key"), [("text", "rms_norm_eps"), ("text", "rope_theta"), ("vision", "rope_theta")])
def test_settings_that_are_no_numbers_to_compute_with(part, key, value):
    config = tiny_config()
    half = config.text_config if part == "text" else config.vision_config
    if key == "rope_theta":
        half.rope_parameters = {**half.rope_parameters, "rope_theta": value}
    else:
        setattr(half, key, value)
    with pytest.raises(ValueError, match=f"{key} = .*expected a number above 0"):
        convert_config(config)


@pytest.mark.parametrize("settings", [{"image_std": [0.5, 0.0, 0.5]}, {"image_mean": [0.5, float("nan"), 0.5]}])
def test_image_settings_that_give_no_numbers(settings, model, tmp_path):
    model.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="image_std"):
        Processor.from_folder(tmp_path)


# ---- pictures ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_drawn_is_drawn_on_the_picture_that_was_read(model, tmp_path):
    """A portrait photograph with EXIF orientation 6 lies on its side until it is opened as the model opens it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "portrait.jpg"
    picture(168, 84).save(path, exif=exif)
    inputs = model.to_inputs("what?", images=[path], answers="red")
    assert inputs.grid() == (6, 3)
    lens, found = logit_lens(model, inputs, "image"), ground(model, inputs)
    for draw in (lens.plot_image, lambda image: found.plot(images=[image]), lambda image: explore(model, inputs, [image])):
        draw(open_image(path))
        with pytest.raises(ValueError, match="168×84 pixels was not read as 3 columns and 6 rows.*open_image"):
            draw(Image.open(path))


@torch.no_grad()
def test_pictures_in_another_order_are_not_explored(model):
    first, second = picture(84, 84, 1), picture(84, 84, 2)
    inputs = model.to_inputs("which?", images=[first, second], answers="red")
    assert explore(model, inputs, [first, second]).grids == ((3, 3), (3, 3))
    with pytest.raises(ValueError, match="image 0 to draw is not image 0"):
        explore(model, inputs, [second, first])


def test_a_box_of_a_transparent_picture_changes_its_own_tokens(model):
    image = picture(168, 168).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 168).astype(np.uint8), (168, 1))))
    plain = model.to_inputs("what?", images=[image])
    box = (30, 30, 80, 80)
    touched = plain.resolve(box).tolist()
    for edited in (blur_box(image, box), swap_box(image, box, picture(168, 168, 5))):
        changed = changed_positions(plain, model.to_inputs("what?", images=[edited])).tolist()
        assert 0 < len(touched) < 36 and set(changed) <= set(touched)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LAB"])
def test_pictures_of_more_than_eight_bits_are_refused(mode, tmp_path):
    image = Image.fromarray(np.full((56, 84), 40_000, np.uint16)) if mode == "I;16" else Image.new(mode, (84, 56))
    assert image.mode == mode
    with pytest.raises(ValueError, match=f"mode '{mode}'.*would lose|mode '{mode}' would lose"):
        open_image(image)
    if mode in ("I;16", "F"):
        path = tmp_path / ("deep.png" if mode == "I;16" else "deep.tiff")
        image.save(path)
        with pytest.raises(ValueError, match="would lose its content"):
            open_image(path)


# ---- threads ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_another_threads_hooks_are_refused(model):
    inputs = model.encode(model.to_inputs("what?", images=[picture(84, 56)]))
    plain, outcomes = model(inputs), []
    entered, done = threading.Event(), threading.Event()

    def edit():
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 0)]):
            entered.set()
            done.wait(10)

    thread = threading.Thread(target=edit)
    thread.start()
    entered.wait(10)
    for call in (lambda: model(inputs), lambda: model.run_with_cache(inputs), lambda: model.generate(inputs, 2, verbose=False)):
        try:
            call()
            outcomes.append("ran")
        except RuntimeError as error:
            outcomes.append(str(error))
    done.set()
    thread.join()
    assert all("another" in text or "other threads have hooks" in text for text in outcomes), outcomes
    assert torch.equal(model(inputs), plain)
