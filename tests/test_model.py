"""The port against the reference implementation, stage by stage, and what must not be true of it."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from conftest import picture, prompts
from tiny import real_rows, reference_batch, reference_logits, spread, tiny_hf
from transformer_lens.model_protocol import TransformerLensModelWithWeights

from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.selfcheck import reference_stages

RELATIVE = 1e-5  # of the logits' spread; measured: 3e-6 at most over all cases
KINDS = ["image", "text", "two images", "video", "image and video", "batch", "no template"]
SHAPES = {
    "grouped": {},
    "multi-query, tied": {"n_key_value_heads": 1, "tie": True},
    "full heads, deeper": {"n_key_value_heads": 4, "n_layers": 5, "vision_layers": 3},
    "one layer, tied": {"n_layers": 1, "vision_layers": 1, "tie": True},
}


def worst(ours: torch.Tensor, theirs: torch.Tensor, inputs: Inputs) -> float:
    """Largest difference at a real position, relative to the spread of the logits."""
    return (real_rows(ours, inputs) - real_rows(theirs, inputs)).abs().max().item() / spread(theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_reference(shape, attention, processor):
    hf = tiny_hf(attention, **SHAPES[shape])
    model = HookedQwen2VL.from_hf(hf, processor)
    for kind, inputs in prompts(model).items():
        with torch.no_grad():
            ours = model(inputs)
        assert worst(ours, reference_logits(hf, inputs), inputs) <= RELATIVE, kind


@pytest.mark.parametrize("kind", KINDS)
def test_explicit_attention_equals_the_reference(kind, model, hf, batches):
    with torch.no_grad():
        ours, cache = model.run_with_cache(batches[kind], names_filter=lambda name: True)
    assert "blocks.0.attn.hook_pattern" in cache
    assert worst(ours, reference_logits(hf, batches[kind]), batches[kind]) <= RELATIVE


# ---- every stage ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "two images", "batch", "video"])
def test_every_stage_equals_the_reference(kind, model, hf, batches):
    inputs = batches[kind]
    theirs = reference_stages(hf, inputs)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=[name for name in theirs if name != "logits"])
    for name, expected in theirs.items():
        if name.startswith("vision"):
            ours = cache.vision[name]
        elif name == "logits":
            ours, expected = real_rows(logits, inputs), real_rows(expected, inputs)
        else:
            ours, expected = real_rows(cache[name], inputs), real_rows(expected, inputs)
        scale = expected.std().item()
        assert (ours - expected).abs().max().item() <= RELATIVE * scale, (name, (ours - expected).abs().max().item() / scale)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_equal_the_reference(kind, hf, batches):
    inputs = batches[kind]
    batch = reference_batch(inputs)
    theirs, delta = hf.model.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        batch.get("image_grid_thw"),
        batch.get("video_grid_thw"),
        batch["attention_mask"],
    )
    mask = inputs.attention_mask.bool()
    assert torch.equal(inputs.position_ids[:, mask], theirs[:, mask])
    assert torch.equal(inputs.rope_delta, delta.flatten())


# ---- a parity test must be able to fail -------------------------------------------------------


def broken(inputs: Inputs, **changes) -> Inputs:
    from dataclasses import replace

    return replace(inputs, **changes)


def test_plain_positions_are_seen(model, hf, batches):
    inputs = batches["image"]
    plain = torch.arange(inputs.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        ours = model(broken(inputs, position_ids=plain))
    assert worst(ours, reference_logits(hf, inputs), inputs) > 100 * RELATIVE


def test_swapped_height_and_width_are_seen(model, hf, batches):
    inputs = batches["image"]
    swapped = inputs.position_ids[[0, 2, 1]]
    with torch.no_grad():
        ours = model(broken(inputs, position_ids=swapped))
    assert worst(ours, reference_logits(hf, inputs), inputs) > 100 * RELATIVE


def test_a_transposed_grid_is_seen(model, hf, batches):
    from dataclasses import replace

    inputs = batches["image"]
    visual = inputs.visuals[0]
    t, h, w = visual.grid
    with torch.no_grad():
        ours = model(broken(inputs, visuals=(replace(visual, grid=(t, w, h)),)))
    assert worst(ours, reference_logits(hf, inputs), inputs) > 100 * RELATIVE


def test_a_missing_delta_is_seen(model, hf, batches):
    inputs = batches["image"]
    greedy = {"max_new_tokens": 12, "do_sample": False, "stop_at_eos": False, "verbose": False}
    right = model.generate(inputs, return_type="tokens", **greedy)
    wrong = model.generate(broken(inputs, rope_delta=torch.zeros(1, dtype=torch.long)), return_type="tokens", **greedy)
    hf.model.rope_deltas = None
    theirs = hf.generate(**reference_batch(inputs), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert torch.equal(right, theirs)
    assert not torch.equal(wrong, theirs)


def test_the_references_double_norm_is_another_prediction(model, hf, batches):
    """What notebooks do: HF's last hidden state is already normed, and they norm it again."""
    inputs = batches["image"]
    hf.model.rope_deltas = None
    with torch.no_grad():
        out = hf(**reference_batch(inputs), output_hidden_states=True)
        twice = hf.lm_head(hf.model.language_model.norm(out.hidden_states[-1]))
    assert worst(twice, out.logits, inputs) > 100 * RELATIVE


def test_another_image_gives_other_logits(model, batches):
    inputs = batches["image"]
    other = model.to_inputs("what is this?", images=[picture(140, 84, 99)])
    assert torch.equal(inputs.tokens, other.tokens) and inputs != other
    with torch.no_grad():
        difference = (model(inputs) - model(other)).abs().amax(-1)[0]
    first = int(inputs.positions("image")[0])
    assert difference[:first].max() == 0.0
    assert difference[first:].min() > 1e-3


# ---- reduced precision ------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", ["image", "two images", "batch", "video"])
def test_bfloat16_is_as_good_as_the_reference(kind, explicit, processor):
    """Error against float32 logits of the same weights, root mean square over three seeds of models."""
    ours_error, theirs_error = 0.0, 0.0
    for seed in range(3):
        half = tiny_hf(dtype=torch.bfloat16, seed=seed)
        model = HookedQwen2VL.from_hf(half, processor)
        inputs = prompts(model)[kind]
        names = (lambda name: True) if explicit else []
        with torch.no_grad():
            ours, _ = model.run_with_cache(inputs, names_filter=names)
        theirs = reference_logits(half, inputs)
        exact = reference_logits(half.float(), inputs)
        ours_error += real_rows(ours.float() - exact, inputs).pow(2).mean().item()
        theirs_error += real_rows(theirs.float() - exact, inputs).pow(2).mean().item()
    assert ours_error**0.5 <= 1.25 * theirs_error**0.5


# ---- what TransformerLens expects -------------------------------------------------------------


def test_it_is_a_transformer_lens_model(model):
    assert isinstance(model, TransformerLensModelWithWeights)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_ends_at_the_logits(kind, model, batches):
    with torch.no_grad():
        logits, cache = model.run_with_cache(batches[kind])
        lens = cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U
    assert (lens - logits).abs().max().item() <= RELATIVE * spread(logits)


def test_the_prefix_is_computed_once(model, batches, monkeypatch):
    inputs = batches["two images"]
    calls = []
    run = type(model).run_tower
    monkeypatch.setattr(type(model), "run_tower", lambda self, i: calls.append(1) or run(self, i))
    encoded = model.encode(inputs)
    with torch.no_grad():
        expected, got = model(inputs), model(encoded)
    assert torch.equal(expected, got)
    assert len(calls) == 2  # encode, and the run on raw inputs
    model.run_with_cache(encoded, names_filter="blocks.0.hook_resid_pre")
    assert len(calls) == 2
    model.run_with_cache(encoded, names_filter="vision_encoder.blocks.0.hook_resid_pre")
    assert len(calls) == 3


def test_another_models_prefix_is_not_used(processor):
    one, two = (HookedQwen2VL.from_hf(tiny_hf(seed=seed), processor) for seed in (0, 1))
    inputs = one.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        assert torch.equal(two(one.encode(inputs)), two(inputs))
        encoded = one.encode(inputs)
        one.vision_encoder.blocks[0].attn.W_O.mul_(2.0)
        assert torch.equal(one(encoded), one(inputs))


def test_stop_and_start_at_a_layer(model, batches):
    inputs = batches["batch"]
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_resid_pre"))
        for layer in range(model.cfg.n_layers):
            stopped = model(inputs, stop_at_layer=layer)
            assert torch.equal(stopped, cache["resid_pre", layer])
            resumed = model(stopped, inputs=inputs, start_at_layer=layer)
            assert (real_rows(resumed - logits, inputs)).abs().max() <= RELATIVE * spread(logits)


def test_logits_at_reads_only_there(model, batches):
    with torch.no_grad():
        logits = model(batches["image"])
        assert torch.allclose(model(batches["image"], logits_at=-1), logits[:, -1:], atol=1e-5)
        assert torch.allclose(model(batches["image"], logits_at=slice(2, 7)), logits[:, 2:7], atol=1e-5)


def test_loss_counts_text_only(model, batches):
    inputs = batches["image"]
    with torch.no_grad():
        logits, loss = model(inputs, return_type="both")
        per_token = model(inputs, return_type="loss", loss_per_token=True)
    log_probs = logits.log_softmax(-1)[0]
    targets = [i for i in range(1, inputs.shape[1]) if inputs.token_types[0, i] == 0]
    expected = -sum(log_probs[i - 1, inputs.tokens[0, i]] for i in targets) / len(targets)
    assert abs(loss - expected) < 1e-5
    assert per_token[0, inputs.positions("image") - 1].abs().max() == 0.0


def test_loss_of_an_answer_counts_the_answer_only(model, batches):
    inputs = batches["batch"]
    with torch.no_grad():
        logits, loss = model(inputs, return_type="both")
    log_probs = logits.log_softmax(-1)
    terms = [-log_probs[row, i - 1, inputs.tokens[row, i]] for row in (0, 2) for i in inputs.positions("answer", row).tolist()]
    assert abs(loss - sum(terms) / len(terms)) < 1e-5


def test_gradients_reach_the_pixels(model, batches):
    from dataclasses import replace

    inputs = batches["image"]
    pixels = inputs.pixels.clone().requires_grad_()
    model(replace(inputs, pixels=pixels))[0, -1].max().backward()
    model.zero_grad()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions(dtype, processor):
    """float16 is near, float64 nearer than float32 ever is."""
    hf = tiny_hf(dtype=dtype)
    model = HookedQwen2VL.from_hf(hf, processor)
    assert model.cfg.dtype == dtype
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    assert logits.dtype == dtype and cache["resid_post", 1].dtype == dtype
    assert worst(logits, reference_logits(hf, inputs), inputs) < (2e-2 if dtype == torch.float16 else 1e-6)


def test_moving_the_model_moves_its_cfg(processor):
    model = HookedQwen2VL.from_hf(tiny_hf(), processor)
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        single = model(inputs)
        model.double()
        assert model.cfg.dtype == torch.float64
        assert (model(inputs) - single).abs().max() < 1e-4 and model(inputs).dtype == torch.float64
        model.half()
    assert model.cfg.dtype == torch.float16


def test_a_compiled_forward_is_the_forward(processor):
    """torch.compile on the plain forward, dynamo's graph run eagerly: the numbers and the image stay; hooks are refused."""
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)
    inputs = model.encode(model.to_inputs("what?", images=[picture(84, 56)]))
    compiled, hook = torch.compile(model, backend="eager"), ("blocks.1.hook_resid_pre", lambda stream, hook: stream * 0)
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), model(inputs), atol=1e-5)
        with model.hooks(fwd_hooks=[hook]), pytest.raises(ValueError, match=r"without hooks.* at blocks\.1\.hook_resid_pre:"):
            compiled(inputs)
        hooked = compiled.run_with_hooks(inputs, fwd_hooks=[hook])  # runs the model itself
        assert torch.allclose(hooked, model.run_with_hooks(inputs, fwd_hooks=[hook])) and not torch.allclose(hooked, model(inputs))
        assert torch.allclose(compiled(inputs), model(inputs), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_by_inductor_it_is_the_forward(processor):
    """Kernels that inductor writes; without a C++ compiler, its graphs run by autograd's eager backend."""
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=1, vision_layers=1), processor)
    inputs = model.encode(model.to_inputs("what?", images=[picture(84, 56)]))
    backend = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
    assert torch.allclose(torch.compile(model, backend=backend)(inputs), model(inputs), atol=1e-5)


def test_accelerate_dispatch_is_exact(tmp_path, processor):
    hf = tiny_hf(n_layers=2)
    hf.save_pretrained(tmp_path)
    plain, spread_out = HookedQwen2VL.from_pretrained(tmp_path), HookedQwen2VL.from_pretrained(tmp_path, device_map="auto")
    plain.processor = processor
    inputs = plain.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        assert torch.equal(plain(inputs), spread_out(inputs))
