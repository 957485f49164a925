"""Checkpoints on disk: what loads, what is shared, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from conftest import picture
from safetensors.torch import load_file, save_file
from tiny import reference_logits, tiny_hf
from transformers import BitsAndBytesConfig

from hooked_qwen2vl import HookedQwen2VL


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def reference(request):
    return tiny_hf(tie=request.param, n_layers=2)


def new_layout(folder, hf):
    """As transformers 5 names parameters in memory: `model.visual.`, `model.language_model.`."""
    hf.save_pretrained(folder)
    head = {} if hf.config.tie_word_embeddings else {"lm_head.weight": hf.lm_head.weight}
    tensors = {f"model.{name}": tensor for name, tensor in hf.model.state_dict().items()} | head
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def old_layout(folder, hf, shards: int):
    """As published: flat configuration, `visual.` and `model.` embeddings, possibly sharded."""
    hf.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()
    }
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("layer_types"), text.pop("tie_word_embeddings", None), text.pop("model_type")
    config = {**text, **config, "rope_theta": rope["rope_theta"]}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"] = {key: value for key, value in config["vision_config"].items() if key not in ("rope_parameters", "hidden_act")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    for n, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[n::shards]}, folder / file)
    index = {"weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["new", "old, sharded"])
def test_a_folder_equals_the_reference(reference, layout, tmp_path, processor):
    new_layout(tmp_path, reference) if layout == "new" else old_layout(tmp_path, reference, 3)
    model = HookedQwen2VL.from_pretrained(tmp_path)
    model.processor = processor
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        assert (model(inputs) - reference_logits(reference, inputs)).abs().max() < 2e-5


def test_from_hf_shares_storage(reference):
    model = HookedQwen2VL.from_hf(reference)
    theirs = {weight.untyped_storage().data_ptr() for weight in reference.parameters()}
    ours = {name: weight.untyped_storage().data_ptr() for name, weight in model.named_parameters()}
    assert [name for name, pointer in ours.items() if pointer not in theirs] == [f"blocks.{layer}.attn.o_proj.bias" for layer in range(2)]
    attn = model.blocks[1].attn
    for view in (attn.W_Q, attn.W_K, attn.W_V, attn.W_O, attn.b_Q, model.blocks[1].mlp.W_out, model.W_U, model.W_E):
        assert view.untyped_storage().data_ptr() in theirs


def test_writing_through_a_view_changes_what_runs(processor):
    model = HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor)
    inputs = model.to_inputs("what?")
    with torch.no_grad():
        before = model(inputs)
        model.blocks[0].attn.W_O[1].zero_()
        _, cache = model.run_with_cache(inputs, names_filter="blocks.0.attn.hook_result")
        assert cache["result", 0][:, :, 1].abs().max() == 0
        assert not torch.equal(model(inputs), before)
        with pytest.raises(RuntimeError):
            model.blocks[0].mlp.b_out.add_(1.0)


def test_every_wrong_key_is_listed(reference, tmp_path):
    new_layout(tmp_path, reference)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.visual.merger.ln_q.weight"]
    tensors["model.extra"] = torch.zeros(1)
    tensors["model.language_model.norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        HookedQwen2VL.from_pretrained(tmp_path)
    for part in ("missing: visual.merger.ln_q.weight", "unused: language_model.extra", "misshapen: language_model.norm"):
        assert part in str(error.value)


def test_a_stored_head_under_tied_embeddings(tmp_path):
    new_layout(tmp_path, tiny_hf(tie=True, n_layers=1))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    HookedQwen2VL.from_pretrained(tmp_path)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the stored head differs"):
        HookedQwen2VL.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["shard gone", "truncated", "no weights", "pickle only", "not json"])
def test_damaged_folders(damage, tmp_path):
    hf = tiny_hf(n_layers=1)
    old_layout(tmp_path, hf, 2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    if damage == "shard gone":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "not json":
        (tmp_path / "config.json").write_text("{")
    else:
        for path in tmp_path.glob("model*"):
            path.unlink()
        if damage == "pickle only":
            (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    expected = {
        "shard gone": "lacks model-00002",
        "truncated": "not a whole safetensors file",
        "no weights": "holds no weights",
        "pickle only": "never opened",
        "not json": "is not JSON",
    }
    with pytest.raises(ValueError, match=expected[damage]):
        HookedQwen2VL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2_5_vl"}, "got model_type 'qwen2_5_vl' with architectures"),  # whose architectures are still Qwen2-VL's
        ({"model_type": "qwen3_vl_moe"}, "has experts"),
        ({"model_type": "qwen2_5_omni"}, "hears and speaks"),
        ({"model_type": "qwen3_5"}, "Qwen3.5 has linear-attention"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mystery": 3}, "mystery = 3"),
    ],
)
def test_other_configurations_are_refused_by_name_and_value(change, message, tmp_path):
    old_layout(tmp_path, tiny_hf(n_layers=1), 1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        HookedQwen2VL.from_pretrained(tmp_path)


QUANTISED = {
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "unknown method": {"something": "new"},
}


@pytest.mark.parametrize("named", QUANTISED)
def test_a_quantised_configuration_is_refused_by_name(named, tmp_path, monkeypatch):
    """Plain weights under such a configuration; what bitsandbytes itself has quantised runs: test_quantised.py."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    expected = rf"is quantised \(quantization_config: {named}\).*nothing was loaded.*in bfloat16"
    hf = tiny_hf(n_layers=1)
    old_layout(tmp_path, hf, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"quantization_config": QUANTISED[named]}, {"text_config": {"quantization_config": QUANTISED[named]}}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        without = "bitsandbytes" in named and "quantization_config" in change
        with pytest.raises(ValueError, match=r"quantised by bitsandbytes: pip install.*in bfloat16" if without else expected):
            HookedQwen2VL.from_pretrained(tmp_path)
    hf.config.quantization_config = QUANTISED[named]
    with pytest.raises(ValueError, match=expected):
        HookedQwen2VL.from_hf(hf)
    del hf.config.quantization_config
    assert HookedQwen2VL.from_hf(hf).cfg.n_layers == 1


def test_transformers_own_quantisation_settings_are_refused():
    hf = tiny_hf(n_layers=1)
    hf.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"\(quantization_config: bitsandbytes, 8 bits\)"):
        HookedQwen2VL.from_hf(hf)


class Wrapped(torch.Tensor):
    """A weight that says it is float32, as torchao's do, and is not."""


def _pack(layer: torch.nn.Linear, kind: str) -> None:
    weight = layer.weight.detach()
    if kind == "uint8":  # two numbers a byte, as bitsandbytes' 4 bits
        layer.weight = torch.nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    elif kind == "int8":  # bitsandbytes' 8 bits: the shape is right
        layer.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    elif kind == "float8":
        layer.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    elif kind == "Wrapped":
        layer.weight = torch.nn.Parameter(weight.as_subclass(Wrapped), requires_grad=False)
    else:  # GPTQ and AWQ: no weight at all
        del layer.weight
        layer.register_buffer("qweight", torch.zeros(4, 48, dtype=torch.int32))
        layer.register_buffer("scales", torch.zeros(1, 48))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("uint8", r"layers\.0\.mlp\.up_proj\.weight is uint8 \[\d+, 1\]"),
        ("int8", r"up_proj\.weight is int8"),
        ("float8", r"up_proj\.weight is float8_e4m3fn"),
        ("Wrapped", r"up_proj\.weight is a Wrapped"),
        ("qweight", r"up_proj\.qweight \(packed\), .*up_proj\.scales \(packed\)"),
    ],
)
def test_packed_weights_are_refused_without_a_word_in_the_configuration(kind, said, tmp_path):
    hf = tiny_hf(n_layers=2)
    _pack(hf.model.language_model.layers[0].mlp.up_proj, kind)
    with pytest.raises(ValueError, match=rf"is quantised \(.*{said}.*\).*nothing was loaded"):
        HookedQwen2VL.from_hf(hf)
    if kind == "Wrapped":
        return  # a file holds no such thing
    new_layout(tmp_path, tiny_hf(n_layers=2))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    own = hf.model.language_model.layers[0].mlp.up_proj.state_dict()
    save_file(tensors | {f"{name}.{key}": value for key, value in own.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"is quantised \(.*{said}.*\).*nothing was loaded"):
        HookedQwen2VL.from_pretrained(tmp_path)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ValueError, match="could not be had from the hub"):
        HookedQwen2VL.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match="no checkpoint at"):
        HookedQwen2VL.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown dtype 'float23'"):
        HookedQwen2VL.from_pretrained("scenes", dtype="float23")


def test_a_hub_cache_is_found(tmp_path, monkeypatch, processor):
    """The hub's own layout: refs, snapshots, blobs."""
    repo = tmp_path / "models--Qwen--Tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    old_layout(snapshot, tiny_hf(n_layers=1), 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "hooked_qwen2vl.checkpoint.snapshot_download",
        lambda *args, **kwargs: __import__("huggingface_hub").snapshot_download(*args, cache_dir=tmp_path, **kwargs),
    )
    model = HookedQwen2VL.from_pretrained("Qwen/Tiny", local_files_only=True)
    assert model.cfg.n_layers == 1
    shutil.rmtree(repo)
