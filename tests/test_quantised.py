"""bitsandbytes' 4- and 8-bit layers through from_hf and from_pretrained: the reference's own logits, hooks, weights that are read."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from conftest import picture
from safetensors.torch import save_file
from tiny import reference_logits, tiny_hf, tiny_processor
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from analyses.common.models import describe_model
from analyses.edge_attribution import edge_attribution
from analyses.logit_lens import logit_lens
from analyses.patching import patch_sweep
from hooked_qwen2vl import HookedQwen2VL

BITS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4 bits, twice": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=BITS)
def folder(request, tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # float32 is cast to float16 before its 8 bits: at every layer
    plain, folder = (tmp_path_factory.mktemp(name) for name in ("plain", "quantised"))
    tiny_hf(n_layers=2).save_pretrained(plain)
    settings = BitsAndBytesConfig(**BITS[request.param])
    hf = Qwen2VLForConditionalGeneration.from_pretrained(plain, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"})
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map={"": "cpu"}).eval()


@pytest.fixture(scope="module")
def model(reference):
    return HookedQwen2VL.from_hf(reference, tiny_processor())


@pytest.fixture(scope="module")
def inputs(model):
    return model.to_inputs("what is this?", images=[picture(84, 56)])


def close(ours, theirs, share=1e-5):
    assert (ours - theirs).abs().max() <= share * theirs.std(), (ours - theirs).abs().max() / theirs.std()


@torch.no_grad()
def test_the_logits_are_the_quantised_references(folder, reference, model, inputs):
    expected = reference_logits(reference, inputs)
    close(model(inputs), expected)
    close(HookedQwen2VL.from_pretrained(folder)(inputs), expected)
    exact = HookedQwen2VL.from_hf(tiny_hf(n_layers=2))(inputs)
    assert (exact - expected).abs().max() > 1e-3 * expected.std()  # it is quantised


@torch.no_grad()
def test_hooks_caches_and_analyses(model, inputs):
    logits = model(inputs)
    names = ("blocks.0.attn.hook_result", "blocks.1.attn.hook_q_input", "blocks.0.hook_attn_in", "blocks.0.attn.hook_pattern")
    for name in names:
        kept, cache = model.run_with_cache(inputs, names_filter=[name])
        close(kept, logits)
        changed = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda value, hook: value.roll(1, -1))])
        assert (changed - logits).abs().max() > 1e-3 * logits.std(), name
    _, cache = model.run_with_cache(inputs, vision=True)
    close(cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U, logits)
    other = model.to_inputs("what is this?", images=[picture(84, 56, 5)])

    def metric(logits):
        return logits[:, -1, 5] - logits[:, -1, 7]

    sweep = patch_sweep(model, inputs, other, metric, positions=["image", "last"], progress=False)
    assert sweep.values.isfinite().all()
    assert logit_lens(model, inputs, top_k=2).entropy.shape[0] == 3
    assert edge_attribution(model, inputs, other, lambda logits: metric(logits).sum(), progress=False).scores.isfinite().all()
    assert model.generate(inputs, max_new_tokens=3, do_sample=False, return_type="tokens", verbose=False).shape[1] >= 1


@torch.no_grad()
def test_weights_are_dequantised_when_read_and_refuse_to_be_written(reference, model):
    layer = reference.model.language_model.layers[1]
    for ours, theirs in (
        (model.W_in[1].T, layer.mlp.up_proj),
        (model.blocks[1].attn.W_Q.transpose(1, 2).flatten(0, 1), layer.self_attn.q_proj),
    ):
        torch.testing.assert_close(ours, dequantize_bnb_weight(theirs.weight, getattr(theirs, "state", None)).float())
    fused = reference.model.visual.blocks[0].attn.qkv
    whole = dequantize_bnb_weight(fused.weight, getattr(fused, "state", None)).float()
    own = model.vision_encoder.blocks[0].attn
    parts = [W.transpose(1, 2).flatten(0, 1) for W in (own.W_Q, own.W_K, own.W_V)]
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(torch.cat([own.b_Q.flatten(), own.b_K.flatten(), own.b_V.flatten()]), fused.bias.float())
    assert model.OV.AB.isfinite().all() and not model.b_O.any()
    with pytest.raises(RuntimeError, match="inference tensor"):
        model.blocks[0].mlp.W_in.mul_(2)
    with pytest.raises(RuntimeError, match="inference tensor"):
        model.blocks[0].attn.W_Q[0] = 0


def test_what_needs_the_weights_in_place_is_refused(model, folder, tmp_path):
    calls = (model.process_weights, lambda: model.export_text_model(tmp_path / "text"), model.half, lambda: model.to(torch.bfloat16))
    for call in calls:
        with pytest.raises(ValueError, match=r"quantised by bitsandbytes, such as .*from_hf\(hf_model.dequantize"):
            call()
    with pytest.raises(ValueError, match="without device_map="):
        HookedQwen2VL.from_pretrained(folder, device_map="auto")


def test_what_tells_models_apart_and_counts_their_numbers(reference, model):
    """The scales, too: packed numbers mean nothing without them."""
    assert model.n_params_total == HookedQwen2VL.from_hf(tiny_hf(n_layers=2)).n_params_total
    before, layer = describe_model(model)["weights"], reference.model.language_model.layers[0].mlp.up_proj
    scales = next(value for name, value in layer.state_dict().items() if name.endswith(("absmax", "SCB")))
    kept = scales.clone()
    scales.copy_(kept.flip(0))
    assert describe_model(model)["weights"] != before
    scales.copy_(kept)
    assert describe_model(model)["weights"] == before


def test_weights_that_are_not_packed_under_such_a_configuration_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(
        {name: value.clone() for name, value in tiny_hf(n_layers=2).state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="23 more are bitsandbytes layers whose weights are not quantised yet, found torch.float32"):
        HookedQwen2VL.from_pretrained(tmp_path)


def test_a_layer_without_a_place_here_is_refused(reference):
    layer = reference.model.language_model.layers[0].mlp.up_proj
    hf = tiny_hf(n_layers=2)
    hf.model.language_model.layers[0].input_layernorm.extra = layer
    with pytest.raises(ValueError, match="input_layernorm.extra is quantised, and has no linear layer's place"):
        HookedQwen2VL.from_hf(hf)


def test_without_bitsandbytes_a_folder_says_what_to_install(tmp_path, monkeypatch):
    hf = tiny_hf(n_layers=1)
    hf.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    hf.config.save_pretrained(tmp_path)
    delattr(hf.config, "quantization_config")
    save_file({name: value.clone() for name, value in hf.state_dict().items()}, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install .hooked-qwen2vl.bitsandbytes"):
        HookedQwen2VL.from_pretrained(tmp_path)
