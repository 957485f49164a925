"""Folders as people have them: the weights that transformers' from_pretrained takes of the same folder, or a refusal by name."""

from __future__ import annotations

import json
import time

import pytest
import torch
from conftest import picture
from safetensors.torch import load_file, save_file
from test_weights import new_layout, old_layout
from tiny import reference_logits, tiny_hf
from transformers import Qwen2VLForConditionalGeneration

from hooked_qwen2vl import HookedQwen2VL

CLOSE = 2e-5  # absolute, of logits of size 1; measured 3e-6
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def hf():
    return tiny_hf(n_layers=2)


@pytest.fixture(scope="module")
def other():
    return tiny_hf(n_layers=2, seed=1)


def logits(model, inputs):
    with torch.no_grad():
        return model(inputs)


def same_as_transformers(folder, processor, **load) -> HookedQwen2VL:
    """Our logits of a folder equal those of transformers' reading of it; ours comes back."""
    ours = HookedQwen2VL.from_pretrained(folder, **load)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder, **load).eval()
    ours.processor = processor
    inputs = ours.to_inputs("what?", images=[picture(84, 56)])
    assert (logits(ours, inputs) - reference_logits(theirs, inputs)).abs().max() < CLOSE
    return ours


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refuses(folder, *parts: str, **load) -> str:
    with pytest.raises(ValueError) as error:
        HookedQwen2VL.from_pretrained(folder, **load)
    said = str(error.value)
    assert all(part in said for part in parts), said
    assert len(said) < 2500
    return said


# ---- files ------------------------------------------------------------------------------------


def test_shards_and_a_whole_file_beside_them(hf, other, tmp_path, processor):
    """transformers takes model.safetensors, whatever the index says."""
    old_layout(tmp_path, hf, 3)
    (tmp_path / "elsewhere").mkdir()
    other.save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / SINGLE).rename(tmp_path / SINGLE)
    ours = same_as_transformers(tmp_path, processor)
    assert torch.equal(ours.embed.weight, other.model.language_model.embed_tokens.weight)


@pytest.mark.parametrize("whole", [True, False])
def test_a_stale_index_whose_shards_are_gone(whole, hf, tmp_path, processor):
    old_layout(tmp_path, hf, 3)
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    if whole:
        hf.save_pretrained(tmp_path)  # leaves the index where it is, in some versions
        weight_map = {"lm_head.weight": "model-00001-of-00003.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        same_as_transformers(tmp_path, processor)
    else:
        refuses(tmp_path, "lists 3 shards but lacks model-00001-of-00003")


@pytest.mark.parametrize("equal", [True, False])
def test_a_weight_under_both_layouts_names(equal, hf, tmp_path, processor):
    new_layout(tmp_path, hf)
    tensors = load_file(tmp_path / SINGLE)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors[name] if equal else tensors[name] + 1
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / SINGLE)
    if equal:
        HookedQwen2VL.from_pretrained(tmp_path)
    else:
        refuses(tmp_path, "holds one weight twice, with different numbers", name, "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("layout", ["new", "old"])
def test_a_tied_model_of_which_only_the_head_was_stored(layout, tmp_path, processor):
    hf = tiny_hf(tie=True, n_layers=1)
    new_layout(tmp_path, hf) if layout == "new" else old_layout(tmp_path, hf, 1)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors.pop(embedding)
    save_file(tensors, tmp_path / SINGLE)
    ours = same_as_transformers(tmp_path, processor)
    assert ours.unembed.weight is ours.embed.weight


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("layout", ["new", "old"])
def test_a_prefix_of_all_names(layout, prefix, hf, tmp_path):
    new_layout(tmp_path, hf) if layout == "new" else old_layout(tmp_path, hf, 1)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = {prefix + name: tensor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, tmp_path / SINGLE)
    said = refuses(tmp_path, f"every weight's name begins with {prefix!r}")
    assert "\n" not in said and "up_proj" not in said


def test_at_most_ten_names_are_listed(hf, tmp_path):
    new_layout(tmp_path, hf)
    tensors = load_file(tmp_path / SINGLE)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1." not in name}, tmp_path / SINGLE)
    said = refuses(tmp_path, "missing: language_model.layers.1.", "and 2 more")
    assert said.count("missing") == 10


def mixed(folder, hf) -> None:
    """A float32 tower and norms in a bfloat16 checkpoint."""
    new_layout(folder, hf)
    tensors = load_file(folder / SINGLE)
    tensors = {name: t if "visual" in name or "norm" in name else t.bfloat16() for name, t in tensors.items()}
    save_file(tensors, folder / SINGLE)
    change_config(folder, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_two_dtypes_load_where_one_is_asked_for(dtype, hf, tmp_path):
    mixed(tmp_path, hf)
    ours = HookedQwen2VL.from_pretrained(tmp_path, dtype=dtype)
    theirs = HookedQwen2VL.from_hf(Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=getattr(torch, dtype)))
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(mine, their), name
    assert ours.cfg.dtype == getattr(torch, dtype) == ours.embed.weight.dtype
    refuses(tmp_path, "mixes weights of several dtypes", "of bfloat16 (such as", "of float32 (such as", "Pass dtype=")


# ---- configurations ---------------------------------------------------------------------------

HARMLESS = {
    "what transformers 4 writes": {
        "torchscript": False, "pruned_heads": {}, "use_bfloat16": False, "tf_legacy_loss": False, "tie_encoder_decoder": False,
        "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "cross_attention_hidden_size": None, "finetuning_task": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "output_attentions": False, "problem_type": None, "add_cross_attention": False,
    },
    "generation settings": {
        "temperature": 1.0, "top_k": 50, "top_p": 1.0, "do_sample": False, "num_beams": 1, "max_length": 20, "repetition_penalty": 1.0,
        "bad_words_ids": None, "early_stopping": False, "no_repeat_ngram_size": 0,
    },
    "what trainers write": {
        "tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096, "vision_lr": 2e-6, "merger_lr": None,
        "freeze_vision_tower": True, "unsloth_version": "2025.1", "_attn_implementation_autoset": True, "gradient_checkpointing": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("half", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("kind", HARMLESS)
def test_keys_that_change_nothing_pass(kind, half, hf, tmp_path, processor):
    new_layout(tmp_path, hf)
    part = json.loads((tmp_path / "config.json").read_text()).get(half, {})
    change_config(tmp_path, **({half: part | HARMLESS[kind]} if half else HARMLESS[kind]))
    HookedQwen2VL.from_pretrained(tmp_path) if half else same_as_transformers(tmp_path, processor)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} (expected {})"),
        ({"torchscript": True}, "torchscript = True (expected False)"),
        ({"temperature": 0.7}, "temperature = 0.7 (expected 1.0)"),
        ({"num_experts": 8}, "num_experts = 8 (a key it does not know)"),
        ({"long": ["x" * 50] * 100}, "…"),
    ],
)
def test_keys_that_may_change_something_are_refused(change, said, hf, tmp_path):
    new_layout(tmp_path, hf)
    change_config(tmp_path, **change)
    refuses(tmp_path, said)


IMPOSSIBLE = [
    ("text_config", {"vocab_size": "x"}, "text_config.vocab_size = 'x'"),
    ("text_config", {"num_attention_heads": 0}, "text_config.num_attention_heads = 0"),
    ("text_config", {"num_hidden_layers": 10**9}, "text_config.num_hidden_layers = 1000000000"),
    ("text_config", {"hidden_size": 64.5}, "text_config.hidden_size = 64.5"),
    ("text_config", {"tie_word_embeddings": "no"}, "text_config.tie_word_embeddings = 'no'"),
    ("text_config", {"rope_parameters": {"mrope_section": "x"}}, "text_config.rope_parameters"),
    ("text_config", {"rope_parameters": 7}, "text_config.rope_parameters = 7"),
    ("text_config", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("text_config", {"layer_types": 3}, "layer_types"),
    ("vision_config", {"depth": 10**9}, "vision_config.depth = 1000000000"),
    ("vision_config", {"num_heads": -3}, "vision_config.num_heads = -3"),
    ("vision_config", {"patch_size": None, "mlp_ratio": "4"}, "vision_config.mlp_ratio = '4'"),
    ("vision_config", {"spatial_merge_size": True}, "vision_config.spatial_merge_size = True"),
    ("", {"text_config": [1, 2]}, "text_config is a list (expected an object)"),
    ("", {"image_token_id": "x"}, "image_token_id = 'x'"),
    ("", {"model_type": ["qwen2_vl"]}, "model_type"),
    ("", {"vision_config": "small"}, "vision_config is a str"),
]


@pytest.mark.parametrize("half, change, said", IMPOSSIBLE, ids=[said for *_, said in IMPOSSIBLE])
def test_configurations_of_no_model(half, change, said, hf, tmp_path):
    """A ValueError that names the key, in a second: not a dataclass's exception, a hang or a memory error."""
    new_layout(tmp_path, hf)
    part = json.loads((tmp_path / "config.json").read_text()).get(half, {})
    change_config(tmp_path, **({half: part | change} if half else change))
    started = time.perf_counter()
    refuses(tmp_path, said)
    assert time.perf_counter() - started < 5  # a hang, not a measurement


# ---- other formats ----------------------------------------------------------------------------

FORMATS = {
    "gguf": (["model-Q4_K_M.gguf"], "GGUF weights (model-Q4_K_M.gguf)"),
    "zero": (["global_step100/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest", "zero_to_fp32.py"], "shards of DeepSpeed ZeRO"),
    "fsdp": (["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"], "distributed checkpoints (FSDP)"),
    "fsdp, one file": (["pytorch_model_fsdp.bin"], "an FSDP checkpoint"),
    "bin": (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pickled weights, which are never opened"),
    "pth": (["consolidated.00.pth"], "pickled weights"),
    "other names": (["weights.safetensors"], "weights.safetensors, and no model.safetensors.index.json"),
    "h5": (["tf_model.h5"], "TensorFlow weights"),
}


@pytest.mark.parametrize("config", [True, False], ids=["", "no config.json"])
@pytest.mark.parametrize("kind", FORMATS)
def test_other_formats_are_named_as_what_they_are(kind, config, hf, tmp_path):
    if config:
        hf.config.save_pretrained(tmp_path)
    files, said = FORMATS[kind]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    refuses(tmp_path, said, "model.safetensors")


def test_single_files_that_are_no_folder(hf, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuses(tmp_path / "model.gguf", "a file of GGUF weights")
    new_layout(tmp_path, hf)
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refuses(tmp_path, "Git LFS pointer", "git lfs pull")
