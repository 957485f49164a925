"""LoRA adapters: the numbers of peft's own model, or a refusal by name. Oracle: transformers and peft on the same folders."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import pandas as pd
import pytest
import torch
from conftest import picture
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import reference_logits, spread, tiny_hf, tiny_processor, tiny_processor3
from transformers import Qwen2VLForConditionalGeneration

from analyses.cli import main
from analyses.data.examples import examples
from analyses.experiments.compare import compare_models, compare_tuned
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.checkpoint import SCENES

TOLERANCE = 2e-5  # of the logits' spread: merged beside unmerged, in float32; measured 5e-6
CLOSE = 5e-7  # merged weights, ours and peft's: the same operations; measured 0
WEIGHTS = "adapter_model.safetensors"

KINDS = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "tower and projector": {"target_modules": ["qkv", "fc1", "mlp.0", "mlp.2", "patch_embed.proj", "down_proj"], "r": 2},
    "dora": {"target_modules": ["q_proj", "o_proj"], "r": 4, "use_dora": True},
    "rank stabilised, ranks and scales by layer": {
        "target_modules": ["q_proj", "k_proj"], "r": 4, "use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"model.language_model.layers.1.self_attn.k_proj": 12},
    },
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "a regular expression": {"target_modules": r"^(?!.*visual).*(?:q_proj|up_proj)"},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["ln_q", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}  # fmt: skip


def tune(model: PeftModel) -> PeftModel:
    """Every weight that training would have moved, moved."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight)) if "magnitude" not in name else weight.mul_(1.3)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_hf(n_layers=2).save_pretrained(folder)
    return folder


def adapter_of(base, folder, **settings):
    """A tuned adapter of the base, as peft writes it."""
    hf = Qwen2VLForConditionalGeneration.from_pretrained(base)
    tune(get_peft_model(hf, LoraConfig(**settings))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def attention(base, tmp_path_factory):
    return adapter_of(base, tmp_path_factory.mktemp("attention"), **KINDS["attention"])


def reference(base, adapter, **load) -> PeftModel:
    return PeftModel.from_pretrained(Qwen2VLForConditionalGeneration.from_pretrained(base, **load), adapter).eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(inputs)


def ask(model, processor):
    model.processor = processor
    return model.to_inputs("which is red?", images=[picture(84, 56)])


def same_weights(ours: HookedQwen2VL, merged) -> None:
    for (name, mine), theirs in zip(ours.named_parameters(), HookedQwen2VL.from_hf(merged).parameters()):
        assert (mine - theirs).abs().max() < CLOSE, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_model_has_pefts_numbers(kind, base, tmp_path, processor):
    adapter = adapter_of(base, tmp_path, **KINDS[kind])
    theirs, plain = reference(base, adapter), HookedQwen2VL.from_pretrained(base)
    ours = HookedQwen2VL.from_pretrained(base, adapter=adapter)
    inputs = ask(ours, processor)
    expected = reference_logits(theirs.get_base_model(), inputs)
    assert (logits(ours, inputs) - expected).abs().max() < TOLERANCE * spread(expected)
    assert (logits(plain, inputs) - expected).abs().max() > 0.02 * spread(expected)  # the adapter shows
    before = copy.deepcopy(theirs.state_dict())
    from_memory = HookedQwen2VL.from_hf(theirs)
    assert all(torch.equal(before[name], now) for name, now in theirs.state_dict().items())
    assert (logits(from_memory, inputs) - expected).abs().max() < TOLERANCE * spread(expected)
    same_weights(ours, theirs.merge_and_unload())
    assert str(adapter) == ours.cfg.adapter and ours.cfg.model_name == f"{base} + {adapter}"
    assert from_memory.cfg.adapter == "default" and plain.cfg.adapter is None


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_adapters_of_the_line(family, tmp_path):
    """On the decoder, the tower and (Qwen3-VL) DeepStack's mergers: peft's own logits."""
    hf = tiny_hf(family=family)
    hf.save_pretrained(tmp_path / "base")
    tower = {"qwen2_5_vl": ["qkv", "gate_proj", "mlp.0"], "qwen3_vl": ["qkv", "linear_fc1", "linear_fc2"]}[family]
    tuned = tune(get_peft_model(hf, LoraConfig(target_modules=["q_proj", "down_proj", *tower], r=2)))
    tuned.save_pretrained(tmp_path / "adapter")
    assert any("deepstack" in name and "lora" in name for name, _ in tuned.named_parameters()) == (family == "qwen3_vl")
    ours = HookedQwen2VL.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    inputs = ask(ours, tiny_processor3() if family == "qwen3_vl" else tiny_processor())
    expected = reference_logits(tuned.get_base_model(), inputs)
    assert (logits(ours, inputs) - expected).abs().max() < TOLERANCE * spread(expected)
    plain = HookedQwen2VL.from_pretrained(tmp_path / "base")
    assert (logits(plain, inputs) - expected).abs().max() > 0.02 * spread(expected)
    same_weights(HookedQwen2VL.from_hf(tuned), tuned.merge_and_unload())


@pytest.mark.parametrize("place", ["by itself", "beside its base"])
def test_a_folder_with_an_adapter_is_the_tuned_model(place, base, attention, tmp_path, processor):
    """As transformers' from_pretrained, with peft installed, reads the same folder."""
    folder = tmp_path / "folder"
    shutil.copytree(attention, folder)
    if place == "beside its base":
        shutil.copytree(base, folder, dirs_exist_ok=True)
    ours = HookedQwen2VL.from_pretrained(folder)
    inputs = ask(ours, processor)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    expected = reference_logits(theirs, inputs)
    assert (logits(ours, inputs) - expected).abs().max() < TOLERANCE * spread(expected)
    in_memory = HookedQwen2VL.from_hf(theirs)  # adapted by transformers, no PeftModel
    assert (logits(in_memory, inputs) - expected).abs().max() < TOLERANCE * spread(expected)
    assert ours.cfg.adapter == str(folder) and in_memory.cfg.adapter == "default"
    if place == "beside its base":
        bare = HookedQwen2VL.from_pretrained(folder, adapter=False)
        assert bare.cfg.adapter is None and torch.equal(bare.W_Q, HookedQwen2VL.from_pretrained(base).W_Q)
    else:
        with pytest.raises(ValueError, match="adapter=False"):
            HookedQwen2VL.from_pretrained(folder, adapter=False)


def test_the_merge_is_the_formula(base, attention):
    """W + (alpha / r) B A, written out."""
    stored, ours, plain = load_file(attention / WEIGHTS), *(HookedQwen2VL.from_pretrained(base, adapter=a) for a in (attention, None))
    for layer in range(2):
        prefix = f"base_model.model.model.language_model.layers.{layer}.self_attn.v_proj.lora_"
        delta = 16 / 4 * stored[f"{prefix}B.weight"] @ stored[f"{prefix}A.weight"]
        mine, before = (model.blocks[layer].attn.v_proj.weight for model in (ours, plain))
        assert (mine - before - delta).abs().max() < 1e-6 and delta.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["attention", "a regular expression", "rank stabilised, ranks and scales by layer"])
def test_an_adapter_trained_before_transformers_5(kind, base, tmp_path):
    """Its names are `model.layers…` and `visual…`; the tuned weights are those of the same adapter under the new names."""
    new, old = tmp_path / "new", tmp_path / "old"
    adapter_of(base, new, **KINDS[kind])
    shutil.copytree(new, old)
    stored = load_file(new / WEIGHTS)
    save_file({key.replace("model.language_model.", "model."): value for key, value in stored.items()}, old / WEIGHTS)
    config = json.loads((new / "adapter_config.json").read_text())
    config["alpha_pattern"] = {key.replace("model.language_model.", "model."): value for key, value in config["alpha_pattern"].items()}
    if isinstance(config["target_modules"], str):
        config["target_modules"] = r"model\.layers\.\d+\..*(?:q_proj|up_proj)"  # matches nothing under the names of now
    (old / "adapter_config.json").write_text(json.dumps(config))
    ours, theirs = (HookedQwen2VL.from_pretrained(base, adapter=folder) for folder in (old, new))
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(mine, their), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_base_is_cast_before_the_merge(dtype, tmp_path):
    """As peft's user would: from_pretrained(base, dtype=…), then the adapter."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_hf(n_layers=1, dtype=torch.bfloat16).save_pretrained(base)
    adapter_of(base, adapter, **KINDS["attention"])
    ours = HookedQwen2VL.from_pretrained(base, adapter=adapter, dtype=dtype)
    theirs = reference(base, adapter, dtype=getattr(torch, dtype)).merge_and_unload()
    assert ours.cfg.dtype == getattr(torch, dtype)
    for (name, mine), their in zip(ours.named_parameters(), HookedQwen2VL.from_hf(theirs).parameters()):
        assert torch.equal(mine, their), name


@pytest.mark.parametrize("kind", ["modules to save", "embedding"])
def test_a_head_that_is_no_longer_the_embedding(kind, tmp_path, processor):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_hf(n_layers=1, tie=True).save_pretrained(base)
    adapter_of(base, adapter, **KINDS[kind])
    ours, theirs = HookedQwen2VL.from_pretrained(base, adapter=adapter), reference(base, adapter)
    inputs = ask(ours, processor)
    expected = reference_logits(theirs.get_base_model(), inputs)
    assert (logits(ours, inputs) - expected).abs().max() < TOLERANCE * spread(expected)
    assert not ours.cfg.text.tie_word_embeddings


def test_adapters_that_are_switched_off_merged_or_two(base, attention, tmp_path, processor):
    theirs, plain = reference(base, attention), HookedQwen2VL.from_pretrained(base)
    inputs = ask(plain, processor)
    with theirs.disable_adapter():
        off = HookedQwen2VL.from_hf(theirs)
        assert off.cfg.adapter is None and torch.equal(logits(off, inputs), logits(plain, inputs))
    other = adapter_of(base, tmp_path, target_modules=["q_proj", "up_proj"], r=2)
    theirs.load_adapter(other, "other")
    theirs.base_model.set_adapter(["default", "other"])
    both = HookedQwen2VL.from_hf(theirs)
    expected = reference_logits(theirs.get_base_model(), inputs)
    assert (logits(both, inputs) - expected).abs().max() < TOLERANCE * spread(expected)
    assert both.cfg.adapter == "default, other"
    theirs.merge_adapter()
    assert (logits(HookedQwen2VL.from_hf(theirs), inputs) - expected).abs().max() < TOLERANCE * spread(expected)


DAMAGE = {
    "half of a file": (lambda t, c: t.pop(next(key for key in t if "lora_B" in key)), "missing: .*lora_B"),
    "a layer is missing": (lambda t, c: [t.pop(key) for key in list(t) if "layers.1." in key], "missing: .*layers.1"),
    "other keys": (lambda t, c: t.update({"something.lora_A.weight": torch.zeros(4, 4)}), "unused: something"),
    "another base's": (lambda t, c: t.update({key: value[:, :-1] for key, value in t.items()}), r"misshapen: .*\(4, 63\)"),
    "not finite": (lambda t, c: next(iter(t.values())).fill_(float("nan")), "not finite: "),
    "a newer peft's setting": (lambda t, c: c.update(spin=0.5), "settings that peft .* does not know: spin = 0.5"),
    "no LoRA": (lambda t, c: c.update(peft_type="LOHA"), "an adapter of type 'LOHA'"),
    "activated": (lambda t, c: c.update(alora_invocation_tokens=[1, 2]), "activated LoRA"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_merged_is_refused(damage, base, attention, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(attention, folder)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    change, message = DAMAGE[damage]
    change(tensors, config)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        HookedQwen2VL.from_pretrained(base, adapter=folder)
    assert len(str(error.value)) < 1500


def test_an_adapter_of_another_type_in_memory():
    hf = get_peft_model(tiny_hf(n_layers=1), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="an adapter of type 'IA3'"):
        HookedQwen2VL.from_hf(hf)


def test_folders_that_are_half_an_adapter(base, attention, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(attention, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/place"}))
    with pytest.raises(ValueError, match=r"an adapter of '/no/such/place'.*adapter="):
        HookedQwen2VL.from_pretrained(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        HookedQwen2VL.from_pretrained(base, adapter=folder)
    beside = tmp_path / "beside"
    shutil.copytree(base, beside)
    shutil.copy(attention / WEIGHTS, beside)
    with pytest.raises(ValueError, match="no adapter_config.json"):
        HookedQwen2VL.from_pretrained(beside)
    shutil.copy(attention / "adapter_config.json", beside)
    with pytest.raises(ValueError, match="transformers would apply both"):
        HookedQwen2VL.from_pretrained(beside, adapter=attention)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        HookedQwen2VL.from_pretrained(base, adapter=base)


def test_without_peft_the_way_out_is_said(base, attention, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"hooked-qwen2vl\[adapters\].*merge_and_unload"):
        HookedQwen2VL.from_pretrained(base, adapter=attention)


@pytest.mark.slow
def test_base_and_tuned_beside_each_other_in_one_call_and_one_command(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    hf = Qwen2VLForConditionalGeneration.from_pretrained(SCENES)
    tune(get_peft_model(hf, LoraConfig(target_modules=["v_proj"], r=2, lora_alpha=8))).save_pretrained(adapter)
    result = compare_tuned("scenes", adapter, list(examples("scenes", 3)), ["image"])
    by_hand = {"base": HookedQwen2VL.from_pretrained("scenes"), "tuned": HookedQwen2VL.from_pretrained("scenes", adapter=adapter)}
    expected = compare_models(by_hand, list(examples("scenes", 3)), ["image"])
    table = result.to_dataframe()
    pd.testing.assert_frame_equal(table, expected.to_dataframe(), rtol=1e-4)
    assert table["model"].tolist() == ["base", "tuned"] and table["answer_prob"].nunique() == 2
    command = ["compare", "--model", "scenes", "--with", f"tuned={adapter}", "--items", "3", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    written = pd.read_csv(tmp_path / "out" / "compare.csv").query("condition == 'image'").set_index("model")
    assert written.loc["tuned", "answer_prob"] == pytest.approx(table.set_index("model").loc["tuned", "answer_prob"], rel=1e-4)
    assert "tuned" in capsys.readouterr().out
    assert main(["check", "--model", "scenes", "--adapter", str(adapter)]) == 0
