"""TransformerLens's own tools on this model: natively, with the image in the run, with the right numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import picture
from tiny import reference_batch, spread, tiny_hf
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools import analysis

from hooked_qwen2vl import HookedQwen2VL

CLOSE = 1e-5  # float32, relative to the activation's own scale
TEXT = "the red thing is blue, what"


@pytest.fixture(scope="module")
def small(processor):
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)


@pytest.fixture(scope="module")
def bridge(small, tmp_path_factory):
    """The same text weights as a TransformerLens bridge: the independent oracle."""
    folder = small.export_text_model(tmp_path_factory.mktemp("qwen2") / "text")
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pair(small):
    """A clean and a corrupted prompt that differ in their image only."""
    question = "is it red?"
    return tuple(small.to_inputs(question, images=[picture(84, 56, seed)]) for seed in (1, 2))


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 7]


# ---- hook by hook against the bridge ----------------------------------------------------------


def test_every_activation_of_the_same_name_agrees(small, bridge):
    tokens = small.to_tokens(TEXT)
    small.set_use_attn_result(True), bridge.set_use_attn_result(True)
    with torch.no_grad():
        ours_logits, ours = small.run_with_cache(tokens)
        theirs_logits, theirs = bridge.run_with_cache(tokens)
    small.set_use_attn_result(False), bridge.set_use_attn_result(False)
    assert (ours_logits - theirs_logits).abs().max() < CLOSE * spread(theirs_logits)
    compared = 0
    for name, expected in theirs.items():
        if name not in ours:
            continue
        got = ours[name]
        if got.shape != expected.shape and got.transpose(1, 2).shape == expected.shape:
            got = got.transpose(1, 2)  # the bridge's rotated queries and keys are heads first
        if name.endswith("hook_attn_scores"):
            visible = got > float("-inf")
            got, expected = got[visible], expected[visible]
        assert got.shape == expected.shape, name
        assert (got - expected).abs().max() < CLOSE * max(1.0, expected.abs().max().item()), name
        compared += 1
    expected_names = {
        f"blocks.{layer}.{hook}"
        for layer in range(2)
        for hook in (
            "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "ln1.hook_scale",
            "ln2.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.hook_pattern",
            "attn.hook_attn_scores", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_result", "mlp.hook_pre",
            "mlp.hook_post",
        )
    }  # fmt: skip
    missing = sorted(name for name in expected_names if name not in theirs)
    assert not missing, f"the bridge no longer has {missing}"
    assert compared >= len(expected_names)


@pytest.mark.parametrize("weight", ["W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "W_in", "W_out", "W_gate"])
def test_the_weights_are_the_bridges(small, bridge, weight):
    ours, theirs = getattr(small, weight), getattr(bridge, weight)
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize("circuit", ["QK", "OV"])
def test_circuits_and_compositions(small, bridge, circuit):
    ours, theirs = getattr(small, circuit), getattr(bridge, circuit)
    assert torch.allclose(ours.AB, theirs.AB, atol=1e-5)
    for mode in ("Q", "K", "V"):
        a, b = small.all_composition_scores(mode), bridge.all_composition_scores(mode)
        assert torch.allclose(a.scores, b.scores, atol=1e-5) and a.head_labels == b.head_labels


# ---- patching ---------------------------------------------------------------------------------

SWEEPS = [
    "resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_head_out_all_pos", "attn_head_q_all_pos",
    "attn_head_k_all_pos", "attn_head_v_all_pos", "attn_head_pattern_all_pos", "attn_head_out_by_pos",
    "attn_head_q_by_pos", "attn_head_k_by_pos", "attn_head_v_by_pos", "attn_head_pattern_by_pos", "block_every",
    "attn_head_all_pos_every",
]  # fmt: skip


@pytest.mark.parametrize("sweep", SWEEPS)
def test_patching_on_text_equals_the_bridge_cell_by_cell(small, bridge, sweep):
    clean, corrupted = (small.to_tokens(text) for text in ("the red thing", "the blu thinh"))
    corrupted = corrupted[:, : clean.shape[1]]
    clean = clean[:, : corrupted.shape[1]]
    patch = getattr(patching, f"get_act_patch_{sweep}")
    cells = []
    for model in (small, bridge):
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            cells.append(patch(model, corrupted, cache, metric))
    ours, theirs = cells
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.std() > 1e-3


@pytest.mark.parametrize("sweep", SWEEPS)
def test_patching_with_an_image_runs_and_keeps_the_image(small, pair, sweep):
    """Cells are not those of a text-only run: patching nothing gives the corrupted image's own metric."""
    clean, corrupted = pair
    patch = getattr(patching, f"get_act_patch_{sweep}")
    with torch.no_grad():
        _, same = small.run_with_cache(corrupted)
        unpatched = patch(small, corrupted, same, metric)
        own = metric(small(corrupted))
        _, other = small.run_with_cache(clean)
        patched = patch(small, corrupted, other, metric)
    if sweep == "attn_head_all_pos_every":  # TransformerLens fills the key-value heads that are not there with 0
        unpatched = unpatched.clone()
        unpatched[2:4, :, small.cfg.n_key_value_heads :] = own
    assert (unpatched - own).abs().max() < 1e-4
    assert (patched - own).abs().max() > 1e-3


def test_identities_of_patching(small, pair):
    """Before the image nothing, at layer 0 the image is everything, at the end only the last position."""
    clean, corrupted = (small.encode(inputs) for inputs in pair)
    with torch.no_grad():
        _, cache = small.run_with_cache(clean)
        own, goal = metric(small(corrupted)), metric(small(clean))
        cells = patching.get_act_patch_resid_pre(small, corrupted, cache, metric)
    recovery = (cells - own) / (goal - own)
    first = int(corrupted.positions("image")[0])
    after = int(corrupted.positions("image")[-1]) + 1
    assert recovery[:, :first].abs().max() < 1e-4
    assert recovery[0, after:].abs().max() < 1e-4
    image = corrupted.positions("image")

    def swap(residual, hook):
        residual[:, image] = cache[hook.name][:, image]

    with torch.no_grad():
        whole = small.run_with_hooks(corrupted, fwd_hooks=[("blocks.0.hook_resid_pre", swap)])
        last = small.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.hook_resid_post", swap)])
    assert abs((metric(whole) - own) / (goal - own) - 1) < 1e-4
    assert abs(metric(last) - own) < 1e-5


HANDS = {  # activation of a sweep -> (module of the reference that makes it, whether it is the module's input)
    "resid_pre": ("", True),
    "attn_out": ("self_attn", False),
    "mlp_out": ("mlp", False),
    "attn_head_q_by_pos": ("self_attn.q_proj", False),
    "attn_head_k_by_pos": ("self_attn.k_proj", False),
    "attn_head_v_by_pos": ("self_attn.v_proj", False),
    "attn_head_out_by_pos": ("self_attn.o_proj", True),
}


@pytest.mark.parametrize("sweep", HANDS)
def test_cells_with_images_equal_the_reference_patched_by_hand(pair, processor, sweep):
    """Sampled cells: a torch hook on the reference makes the same replacement, the image in both runs."""
    hf = tiny_hf(n_layers=2)
    model = HookedQwen2VL.from_hf(hf, processor)
    clean, corrupted = pair
    path, is_input = HANDS[sweep]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        cells = getattr(patching, f"get_act_patch_{sweep}")(model, corrupted, cache, metric)
    places = [int(corrupted.positions("image")[2]), int(corrupted.positions("question")[0]), corrupted.shape[1] - 1]
    for layer in range(2):
        for at, head in zip(places, (0, 1, 1)):
            block = hf.model.language_model.layers[layer]
            module = block.get_submodule(path) if path else block
            ours = cells[layer, at, head] if cells.ndim == 3 else cells[layer, at]
            width = slice(16 * head, 16 * head + 16) if cells.ndim == 3 else slice(None)
            theirs = _patched_by_hand(hf, module, is_input, clean, corrupted, at, width)
            assert abs(ours - theirs) < 1e-4, (layer, at, head)


def _patched_by_hand(hf, module, is_input, clean, corrupted, at, width):
    kept = []

    def replaced(value):
        if len(kept) < 1:
            kept.append(value.clone())
            return value
        patched = value.clone()
        patched[:, at, width] = kept[0][:, at, width]
        return patched

    def before(module, args):
        return (replaced(args[0]), *args[1:])

    def after(module, args, output):
        return (replaced(output[0]), *output[1:]) if isinstance(output, tuple) else replaced(output)

    handle = module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
    try:
        for inputs in (clean, corrupted):
            hf.model.rope_deltas = None
            with torch.no_grad():
                result = metric(hf(**reference_batch(inputs)).logits)
    finally:
        handle.remove()
    return result


def test_processed_log_probabilities_agree_with_the_processed_bridge(processor, tmp_path):
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)
    bridge = TransformerBridge.boot_transformers(str(model.export_text_model(tmp_path / "text")), device="cpu", dtype=torch.float32)
    bridge.enable_compatibility_mode()
    model.process_weights()
    tokens = model.to_tokens(TEXT)
    with torch.no_grad():
        ours, theirs = (m(tokens).log_softmax(-1) for m in (model, bridge))
    assert (ours - theirs).abs().max() < 1e-4


# ---- attention by hand, and knocked out -------------------------------------------------------


@pytest.mark.parametrize("half", ["", "vision_encoder."])
@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
def test_an_edited_pattern_is_what_runs(small, pair, half, hook):
    """What attention writes is the edited pattern times the values through W_O, computed by hand."""
    name = f"{half}blocks.1"
    attn = small.get_submodule(f"{name}.attn")
    edits = {
        "hook_pattern": lambda pattern, hook: pattern.flip(1) * 0.5,
        "hook_attn_scores": lambda scores, hook: scores * 2.0,
    }
    wanted = [f"{name}.attn.hook_pattern", f"{name}.attn.hook_v", f"{name}.hook_attn_out", f"{name}.attn.hook_attn_scores"]
    with torch.no_grad():
        _, plain = small.run_with_cache(pair[0], names_filter=wanted)
        with small.hooks(fwd_hooks=[(f"{name}.attn.{hook}", edits[hook])]):
            _, edited = small.run_with_cache(pair[0], names_filter=wanted)
        if hook == "hook_pattern":
            pattern = plain[wanted[0]].flip(1) * 0.5
        else:
            pattern = (plain[wanted[3]] * 2.0).softmax(-1)
        v = plain[wanted[1]].repeat_interleave(attn.n_heads // attn.n_key_value_heads, dim=2)
        expected = torch.einsum("bhqk,bkhd,hdm->bqm", pattern, v, attn.W_O) + attn.b_O
    assert torch.allclose(edited[wanted[2]], expected, atol=1e-5)
    assert not torch.allclose(edited[wanted[2]], plain[wanted[2]], atol=1e-2)


def test_identities_of_knockout(small, pair):
    """Image to every later position, in all layers, hides the image from them; image to last does not."""
    image, n = pair[0].positions("image"), pair[0].shape[1]
    after = torch.arange(int(image[-1]) + 1, n)

    def block(queries):
        def hook(scores, hook):
            scores[:, :, queries[:, None], image] = float("-inf")
            return scores

        return [(f"blocks.{layer}.attn.hook_attn_scores", hook) for layer in range(small.cfg.n_layers)]

    with torch.no_grad():
        one, two = (small.run_with_hooks(inputs, fwd_hooks=block(after)) for inputs in pair)
        assert torch.equal(one[:, after], two[:, after])
        assert (one[:, image] - two[:, image]).abs().max() > 1e-3
        one, two = (small.run_with_hooks(inputs, fwd_hooks=block(after[-1:])) for inputs in pair)
        assert (one[:, -1] - two[:, -1]).abs().max() > 1e-4


# ---- attribution ------------------------------------------------------------------------------


@pytest.mark.parametrize("processed", [False, True])
def test_the_components_sum_to_the_logits(processor, pair, processed):
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)
    if processed:
        model.process_weights()
    with torch.no_grad():
        logits, cache = model.run_with_cache(pair[0])
        difference = logits[0, -1, 5] - logits[0, -1, 7]
        for stack in (
            cache.decompose_resid(pos_slice=-1),
            cache.get_full_resid_decomposition(pos_slice=-1, expand_neurons=False),
            cache.get_full_resid_decomposition(pos_slice=-1, expand_neurons=True),
            cache.stack_head_results(pos_slice=-1, incl_remainder=True),
            cache.stack_neuron_results(pos_slice=-1, incl_remainder=True, layer=-1),
        ):
            attributed = cache.logit_attrs(stack, 5, 7, pos_slice=-1)
            assert abs(attributed.sum() - difference) < 1e-4


@pytest.mark.parametrize("processed", [False, True])
def test_projected_decompositions_agree_with_the_plain_ones(processor, pair, processed):
    """The fused path (norm, then a direction) is the plain path times the direction."""
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)
    if processed:
        model.process_weights()
    with torch.no_grad():
        _, cache = model.run_with_cache(pair[0])
        direction = model.W_U[:, 5]
        for expand in (False, True):
            settings = {"pos_slice": -1, "apply_ln": True, "expand_neurons": expand}
            plain = cache.get_full_resid_decomposition(**settings) @ direction
            fused = cache.get_full_resid_decomposition(**settings, project_output_onto=direction)
            assert torch.allclose(plain, fused, atol=1e-5)


def test_attribution_patching_against_finite_differences(processor, pair):
    """float64: the gradient times the difference is the slope of patching a little."""
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=2).double(), processor)
    clean, corrupted = pair
    name = "blocks.1.hook_resid_pre"
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        _, base = model.run_with_cache(corrupted)
    direction = cache[name] - base[name]
    stream = base[name].clone().requires_grad_()
    metric(model(stream, inputs=corrupted, start_at_layer=1)).backward()
    slope = (stream.grad * direction).sum()
    model.zero_grad()
    step = 1e-5
    with torch.no_grad():
        up, down = (
            metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, lambda x, hook, s=s: x + s * direction)])) for s in (step, -step)
        )
    assert abs((up - down) / (2 * step) - slope) < 1e-6 * max(1, abs(slope))


# ---- the rest ---------------------------------------------------------------------------------


def test_tools_that_take_a_model(small, pair):
    with torch.no_grad():
        lens = analysis.logit_lens(small, pair[0], targets=[5])
        logits = small(pair[0])
    assert torch.allclose(lens.values[-1, 0, 0], logits[0, -1, 5], atol=1e-5)


def test_cache_slicing_leaves_the_tower_alone(small):
    inputs = small.to_inputs(["what?", "is it red?"], images=[[picture(84, 56, 1)], [picture(56, 56, 2)]])
    with torch.no_grad():
        _, cache = small.run_with_cache(inputs, vision=True)
        _, sliced = small.run_with_cache(inputs, vision=True, pos_slice=slice(-3, None))
        _, single = small.run_with_cache(inputs[0], vision=True, remove_batch_dim=True)
    n_patches = inputs.pixels.shape[0]
    for name, value in cache.vision.items():
        assert torch.equal(value, sliced.vision[name]) and value.shape[0] == 1, name
    assert cache.vision["vision_encoder.blocks.0.hook_resid_post"].shape == (1, n_patches, 48)
    for name, value in cache.items():
        keep = value[..., -3:, :] if name.endswith(("scores", "pattern")) else value[:, -3:]
        assert torch.allclose(sliced[name], keep, atol=1e-5, equal_nan=True), name
        assert single[name].ndim == value.ndim - 1, name
    row = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(row["resid_post", 1], cache["resid_post", 1][1]) and row.vision.keys() == cache.vision.keys()
    assert not row.has_batch_dim


def test_one_images_activations_in_raster_order(small):
    from hooked_qwen2vl import cache_image

    inputs = small.to_inputs(["what?", "is it red?"], images=[[picture(84, 56, 1)], [picture(56, 112, 2)]])
    with torch.no_grad():
        _, cache = small.run_with_cache(inputs, vision=True)
        _, alone = small.run_with_cache(inputs[1], vision=True)
    both = cache_image(cache, "vision_encoder.hook_patch_embed", inputs, row=1)
    assert both.shape[:2] == (8, 4)
    assert torch.allclose(both, cache_image(alone, "vision_encoder.hook_patch_embed", inputs[1]), atol=1e-5)
    from PIL import Image

    bright = Image.new("RGB", (84, 56))
    bright.paste((255, 255, 255), (42, 14, 56, 28))  # patch row 1, column 3
    marked = small.to_inputs("what?", images=[bright])
    with torch.no_grad():
        _, cache = small.run_with_cache(marked, vision=True)
    patches = cache_image(cache, "vision_encoder.hook_patch_embed", marked)
    differs = (patches - patches[0, 0]).abs().amax(-1) > 1e-3
    assert differs.nonzero().tolist() == [[1, 3]]
    tokens = cache_image(cache, "vision_projector.hook_out", marked)
    assert tokens.shape[:2] == marked.grid()


def test_gradients_are_cached(small, pair):
    inputs = replace(pair[0])
    _, cache = small.run_with_cache(inputs, return_type="loss", incl_bwd=True)
    assert cache["blocks.0.hook_resid_pre_grad"].abs().sum() > 0
    assert cache["blocks.1.attn.hook_z_grad"].shape == cache["z", 1].shape
    small.zero_grad()
