"""What TransformerLens users write, beside TransformerLens's own bridge on the same text weights, raw and processed."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from conftest import picture
from tiny import tiny_hf
from transformer_lens import evals, utilities
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_protocol import TransformerLensModelWithWeights

from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.hook_names import canonical, is_vision

CLOSE = 1e-4
TEXT = "the red thing is blue, what"
SPLIT = [f"hook_{letter}_input" for letter in "qkv"]


@pytest.fixture(scope="module", params=[False, True], ids=["raw", "processed"])
def pair(request, processor, tmp_path_factory):
    """Our model and the bridge, both raw or both in compatibility mode."""
    ours = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)
    folder = ours.export_text_model(tmp_path_factory.mktemp("qwen2") / "text")
    theirs = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    if request.param:
        for model in (ours, theirs):
            model.enable_compatibility_mode(disable_warnings=True)
    return ours, theirs


@pytest.fixture(scope="module")
def small(processor):
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)


@pytest.fixture(scope="module")
def inputs(small):
    return small.to_inputs("is it red?", images=[picture(84, 56)])


def log_probs(logits):
    return logits.log_softmax(-1)


# ---- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SPLIT, "hook_in", "hook_out", "mlp.hook_out", "attn.hook_out"])
def test_other_names_of_a_blocks_hooks(pair, name):
    """In hooks, filters and caches: the bridge's activation, and an edit under that name has the bridge's effect."""
    for model in pair:
        model.set_use_split_qkv_input(True)
    name = f"blocks.1.{name}"
    tokens = pair[0].to_tokens(TEXT)
    edited = []
    for model in pair:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=lambda other: other in (name, canonical(name)))
            shift = 0.1 * torch.randn(cache[name].shape[1:], generator=torch.Generator().manual_seed(1))
            hooked = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, shift=shift: x + shift)])
            edited.append((cache[name], log_probs(hooked)))
        model.set_use_split_qkv_input(False)
    assert (edited[0][0] - edited[1][0]).abs().max() < CLOSE and (edited[0][1] - edited[1][1]).abs().max() < CLOSE
    assert (edited[0][1] - log_probs(pair[0](tokens))).abs().max() > 1e-3


def test_shorthand_and_the_unembedding(small, inputs):
    named = ["blocks.1.hook_q_input", utilities.get_act_name("v_input", 0), "hook_unembed", "embed.hook_out"]
    with torch.no_grad():
        logits, cache = small.run_with_cache(inputs, names_filter=named)
        doubled = small.run_with_hooks(inputs, fwd_hooks=[("hook_unembed", lambda logits, hook: logits * 2)])
        seen = []
        small.run_with_hooks(inputs, fwd_hooks=[(lambda name: name == "blocks.1.hook_k_input", lambda x, hook: seen.append(hook.name))])
    assert set(cache.keys()) == {"blocks.1.attn.hook_q_input", "blocks.0.attn.hook_v_input", "unembed.hook_out", "hook_embed"}
    assert cache["q_input", 1] is cache["q_input", -1] is cache["blocks.1.attn.hook_q_input"] and "blocks.1.hook_q_input" in cache
    assert torch.equal(cache["hook_unembed"], logits) and torch.equal(doubled, logits * 2)
    assert seen == ["blocks.1.attn.hook_k_input"]
    assert small.get_hook_point("blocks.1.attn.hook_attn_in") is small.blocks[1].hook_attn_in
    assert small.get_hook_point("blocks.1.hook_q_input") is small.blocks[1].attn.hook_q_input and small.get_hook_point("x") is None


def test_unknown_names_say_the_same_everywhere(small, inputs):
    wrong = "blocks.1.hook_resid_pst"
    hook = [(wrong, lambda x, hook: x)]
    for run in (
        lambda: small.run_with_hooks(inputs, fwd_hooks=hook),
        lambda: small.run_with_hooks(inputs, bwd_hooks=hook, reset_hooks_end=False),
        lambda: small.run_with_cache(inputs, names_filter=wrong),
        lambda: small.add_hook(wrong, hook[0][1]),
        lambda: small.generate(inputs, fwd_hooks=hook),
    ):
        with pytest.raises(ValueError, match=r"did you mean 'blocks.1.hook_resid_post'.*transformer_lens\.utilities\.get_act_name"):
            run()
    assert not small._hooking_threads


def test_what_a_cache_did_not_keep(small, inputs):
    with torch.no_grad():
        _, cache = small.run_with_cache(inputs)
    for key, said in {
        "vision_encoder.blocks.0.hook_resid_pre": "vision=True",
        ("result", 1): "'blocks.1.attn.hook_result' was not kept.*names_filter",
        "nothing": "no hook point is called",
    }.items():
        with pytest.raises(KeyError, match=said):
            cache[key]


# ---- weights and processing -------------------------------------------------------------------


def test_compatibility_mode_and_parameters(pair):
    ours, theirs = pair
    tokens = ours.to_tokens(TEXT)
    with torch.no_grad():
        assert (log_probs(ours(tokens)) - log_probs(theirs(tokens))).abs().max() < CLOSE
        mine, bridges = ours.get_params(), theirs.get_params()
        for layer in range(2):  # TransformerLens has no such bias, and it is none
            assert not mine.pop(f"blocks.{layer}.mlp.b_gate").any()
        assert mine.keys() == bridges.keys()
        for name, weight in mine.items():
            assert weight.shape == bridges[name].shape and (weight - bridges[name]).abs().max() < CLOSE, name
    assert ours.all_head_labels == theirs.all_head_labels == ours.all_head_labels() == ours.attn_head_labels == theirs.attn_head_labels
    assert torch.equal(ours.embed.W_E, theirs.embed.W_E)
    assert ours.cfg.n_params == sum(getattr(ours, name).numel() for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"))


def test_the_number_of_parameters(processor):
    for tie in (False, True):
        hf = tiny_hf(n_layers=2, tie=tie)
        assert HookedQwen2VL.from_hf(hf, processor).n_params_total == sum(weight.numel() for weight in hf.parameters())


def test_the_arguments_of_processing(processor):
    for name in ("process_weights", "enable_compatibility_mode"):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (HookedQwen2VL, TransformerBridge))
        assert set(ours) == set(theirs)
        changed = {argument for argument in ours if ours[argument].default != theirs[argument].default} - {"self"}
        assert changed == {"center_writing_weights"}  # None, so that True can be told apart and warned about
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=1), processor)
    before = model(model.to_tokens(TEXT))
    with pytest.raises(ValueError, match="refactor_factored_attn_matrices"):
        model.process_weights(refactor_factored_attn_matrices=True)
    model.enable_compatibility_mode(no_processing=True)
    assert torch.equal(before, model(model.to_tokens(TEXT)))
    with pytest.warns(UserWarning, match="center_writing_weights"):
        model.process_weights(center_writing_weights=True)


def test_from_pretrained_as_it_was_written():
    for argument in ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"):
        with pytest.raises(ValueError, match=rf"model.process_weights\({argument}=True\)"):
            HookedQwen2VL.from_pretrained("scenes", **{argument: True})
    with pytest.raises(ValueError, match="from_hf"):
        HookedQwen2VL.from_pretrained("scenes", hf_model=object())
    with pytest.raises(TypeError, match="nobodys"):
        HookedQwen2VL.from_pretrained("scenes", nobodys=None)
    assert HookedQwen2VL.from_pretrained_no_processing("scenes", fold_ln=False, center_unembed=False, hf_model=None).cfg.model_name


def test_what_there_is_not(small):
    for name in ("W_pos", "W_E_pos", "pos_embed"):
        assert not hasattr(small, name)
        with pytest.raises(AttributeError, match="rotations"):
            getattr(small, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        getattr(small, "no_such_thing")  # noqa: B009


def test_the_protocol_is_met_statically(small):
    """As `isinstance` asks from Python 3.12 on: names are looked up without running anything."""
    members = [name for name in dir(TransformerLensModelWithWeights) if not name.startswith("_")]
    assert {"blocks", "ln_final", "cfg", "run_with_cache"} <= set(members)
    for name in members:
        inspect.getattr_static(small, name)
    assert isinstance(small, TransformerLensModelWithWeights)
    assert small.blocks is small.get_submodule("blocks") and small.ln_final is small.get_submodule("ln_final")


# ---- running ----------------------------------------------------------------------------------


def test_the_stream_that_enters(pair, inputs):
    ours, theirs = pair
    with torch.no_grad():
        residual, tokens, nothing, mask = ours.input_to_embed(TEXT)
        expected = theirs.input_to_embed(TEXT)
        assert torch.equal(residual, expected[0]) and torch.equal(tokens, expected[1]) and nothing is None
        assert torch.equal(ours(residual, start_at_layer=0, inputs=tokens, attention_mask=mask), ours(TEXT))
        residual, same, _, _ = ours.input_to_embed(inputs)
        assert same == inputs and torch.equal(ours(residual, start_at_layer=0, inputs=same), ours(inputs))


def test_hooks_without_the_batch(pair, inputs):
    ours, theirs = pair
    tokens = ours.to_tokens(TEXT)

    def edit(pattern, hook):
        assert pattern.ndim == 3
        pattern[:, -1, 0] = 0
        return pattern

    hooks = [("blocks.1.attn.hook_pattern", edit)]
    with torch.no_grad():
        edited = [log_probs(model.run_with_hooks(tokens, fwd_hooks=hooks, remove_batch_dim=True)) for model in pair]
        assert (edited[0] - edited[1]).abs().max() < CLOSE < (edited[0] - log_probs(ours(tokens))).abs().max()
        shapes = []
        vision = [("vision_encoder.blocks.0.hook_resid_pre", lambda x, hook: shapes.append(x.ndim))]
        ours.run_with_hooks(inputs, fwd_hooks=vision, remove_batch_dim=True)
        assert shapes == [3]  # the tower's first axis is no batch
    with pytest.raises(ValueError, match="one prompt"):
        ours.run_with_hooks(tokens.repeat(2, 1), fwd_hooks=hooks, remove_batch_dim=True)


def test_small_things(small, processor):
    assert small.to("cpu", print_details=False) is small
    seen = []
    small.add_hook("blocks.0.hook_out", hook_fn=lambda x, hook: seen.append(hook.name))
    with torch.no_grad():
        small(TEXT)
        small.reset_hooks()
        small(TEXT)
    assert seen == ["blocks.0.hook_resid_post"]
    with pytest.raises(TypeError, match="hook_fn="):
        small.add_hook("hook_embed")
    with pytest.raises(ValueError, match="start_at_layer"):
        small(TEXT, inputs=small.to_inputs(TEXT))


def test_setting_the_tokenizer(processor):
    bare = HookedQwen2VL.from_hf(tiny_hf(n_layers=1))
    bare.tokenizer = processor.tokenizer
    full = HookedQwen2VL.from_hf(tiny_hf(n_layers=1), processor)
    texts = [TEXT, "red thing"]
    with torch.no_grad():
        assert torch.equal(bare(texts), full(texts)) and torch.equal(bare(bare.to_tokens(texts)), full(texts))
        assert torch.equal(bare("<|endoftext|>red"), full("<|endoftext|>red"))
    assert bare.generate(TEXT, do_sample=False, verbose=False) == full.generate(TEXT, do_sample=False, verbose=False)
    other = HookedQwen2VL.from_pretrained("scenes").tokenizer
    for model in (bare, full):
        with pytest.raises(ValueError, match="another model"):
            model.tokenizer = other


@pytest.mark.parametrize("kind", ["image", "batch"])
def test_a_cache_of_keys_and_values_by_hand(kind, model, batches):
    """Several tokens at a time on top of a past, images and padding in it: the logits of the whole at once."""
    prompt = batches[kind]
    done = model.generate(prompt, return_type="inputs", max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    new = done.tokens[:, -5:]
    with torch.no_grad():
        whole = model(done)
        past = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(prompt))
        ours = [model(prompt, past_kv_cache=past), model(new[:, :2], past_kv_cache=past)]
        past.freeze()
        last = model(new[:, 2:], past_kv_cache=past)
        assert torch.equal(last, model(new[:, 2:], past_kv_cache=past))  # a frozen one does not grow
        assert torch.allclose(torch.cat([*ours, last], 1)[done.attention_mask.bool()], whole[done.attention_mask.bool()], atol=CLOSE)
        logits, past = model(prompt, return_type="logits_and_cache")
        following, past = model(new, return_type="logits_and_cache", past_key_values=past)
        assert torch.allclose(following, whole[:, -5:], atol=CLOSE) and torch.equal(logits, ours[0])
    with pytest.raises(ValueError, match="images can come only"):
        model(prompt if prompt.visuals else batches["image"], past_kv_cache=past)
    with pytest.raises(ValueError, match="takes a TransformerLensKeyValueCache"):
        model(new, past_key_values=object())
    with pytest.raises(ValueError, match="drop the loss"):
        model(new, past_kv_cache=past, return_type="loss")
    strange = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(prompt))
    strange.entries[0].append(*torch.zeros(2, len(prompt), 3, model.cfg.n_key_value_heads, model.cfg.d_head))
    with pytest.raises(ValueError, match="no run of this model"):
        model(new, past_kv_cache=strange)


def test_looking_does_not_change_a_bit(small, inputs):
    """A cache that holds no attention and no splitting leaves the arithmetic as it is; docs say what else does."""

    def spared(name):
        written_out = ("hook_pattern", "hook_attn_scores", "hook_result", "_input", "attn_in")
        return not name.endswith(written_out) and not (is_vision(name) and "ln" in name)

    with torch.no_grad():
        for prompt in (inputs, TEXT):
            plain = small(prompt)
            looked, cache = small.run_with_cache(prompt, names_filter=spared)
            assert torch.equal(looked, plain) and len(cache) > 20
            everything, _ = small.run_with_cache(prompt)
            assert (everything - plain).abs().max() < 1e-5  # measured 3e-6, of logits with a spread of 1.2


def test_prompts_and_evaluations(processor, capsys):
    """TransformerLens's own functions, with prepend_bos=True, which there is not."""
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=1, d_vocab=20_100), processor)
    with torch.no_grad(), pytest.warns(UserWarning, match="no BOS"):
        utilities.test_prompt("the red", " blue", model, prepend_bos=True)
    assert "Ranks of the answer tokens" in capsys.readouterr().out
    assert evals.sanity_check(model).isfinite()
    assert evals.induction_loss(model, device="cpu", subseq_len=40).isfinite()
    dataset = evals.IOIDataset(model.tokenizer, num_samples=4, prepend_bos=False)  # its default reads the tokenizer's BOS itself
    assert 0 <= evals.ioi_eval(model, dataset)["Accuracy"] <= 1


@pytest.mark.parametrize("way", ["run_with_hooks", "add_hook"])
def test_a_filter_of_a_hook_means_the_decoder(model, batches, way):
    """TransformerLens's Main_Demo writes scores by `hook.layer()`: the tower's patterns must not be written over the decoder's."""
    seen = []

    def see(value, hook):
        seen.append(hook.name)

    def run(names_filter):
        seen.clear()
        if way == "run_with_hooks":
            model.run_with_hooks(batches["image"], fwd_hooks=[(names_filter, see)])
        else:
            model.add_hook(names_filter, see)
            model(batches["image"])
            model.reset_hooks()
        return sorted(seen)

    with pytest.warns(UserWarning, match="hook points of the vision tower"):
        both = run(lambda name: name.endswith("hook_pattern"))
    assert both == [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower = run(lambda name: is_vision(name) and name.endswith("hook_pattern"))
        named = run(lambda name: name == "blocks.0.attn.hook_pattern")
    assert tower == [f"vision_encoder.blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.vision.n_layers)]
    assert named == ["blocks.0.attn.hook_pattern"]
